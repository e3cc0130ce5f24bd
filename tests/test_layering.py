"""The tree keeps its layers, and private host names stay in their two folders."""

import ast
import pathlib
import re

import pytest

import tfaccel

ROOT = pathlib.Path(tfaccel.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
STAGES = ("prepare", "fit", "export", "launch")
PRIVATE_ALLOWED = ("keras_fixes", "fast_kernels")


def relative(path):
    return path.relative_to(ROOT).as_posix()


def in_folders(names):
    return [path for path in FILES if path.relative_to(ROOT).parts[0] in names]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_files_were_found():
    assert len(FILES) > 20


@pytest.mark.parametrize("path", in_folders((*STAGES, *PRIVATE_ALLOWED)), ids=relative)
def test_stages_do_not_import_one_another(path):
    stage = path.relative_to(ROOT).parts[0]
    others = [other for other in STAGES if other != stage]
    found = [name for name in imports(path) if re.match(rf"tfaccel\.({'|'.join(others)})\b", name)]
    assert found == []


@pytest.mark.parametrize("path", sorted(set(FILES) - set(in_folders(PRIVATE_ALLOWED))), ids=relative)
def test_private_host_names_stay_in_their_folders(path):
    text = path.read_text()
    assert not re.search(r"\bkeras\.src\b|\btensorflow\.python\b", text)
    private = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    ]
    assert private == []


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 45, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_heavy_modules_are_imported_where_they_are_used(path):
    tree = ast.parse(path.read_text())
    top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name.split(".")[0] for n in top if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module.split(".")[0] for n in top if isinstance(n, ast.ImportFrom) and n.module}
    heavy = {"ai_edge_litert", "ai_edge_quantizer", "matplotlib", "tensorflow_model_optimization"}
    assert not names & heavy
