"""The driver for memory and race checkers leaves nothing out."""

import ast

import conftest
from gpu.every_kernel import run_every_kernel
from on_device import Workbench


def test_every_function_of_the_module_is_called(bench: Workbench):
    run_every_kernel(bench)
    stub = ast.parse((conftest.ROOT / "pympa" / "_cuda.pyi").read_text())
    names = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    for node in stub.body:
        names |= {a.name for a in node.names} if isinstance(node, ast.ImportFrom) else set()
    names -= {"Array", "supported_isas", "load_gemm"}
    assert names <= bench.core.called
