"""The driver for memory and race checkers leaves nothing out."""

import ast

from support.drivers.every_kernel import run_every_kernel
from support.jobs import ROOT
from support.rig import Rig


def test_every_function_of_the_module_is_called(rig: Rig):
    run_every_kernel(rig)
    stubs = [ROOT / "pympa" / "_cuda.pyi", *(ROOT / "pympa" / "_stubs").glob("*.pyi")]
    body = [node for stub in stubs for node in ast.parse(stub.read_text()).body]
    names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names -= {"supported_isas", "why_no_tiles", "load_gemm"}
    assert names <= rig.core.called
