"""The driver for memory and race checkers leaves nothing out."""

import ast

from support.drivers.every_kernel import run_every_kernel
from support.jobs import ROOT
from support.rig import Rig


def test_every_function_of_the_module_is_called(rig: Rig):
    run_every_kernel(rig)
    stub = ast.parse((ROOT / "pympa" / "_cuda.pyi").read_text())
    names = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    for node in stub.body:
        names |= {a.name for a in node.names} if isinstance(node, ast.ImportFrom) else set()
    names -= {"Array", "supported_isas", "load_gemm"}
    assert names <= rig.core.called
