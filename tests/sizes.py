"""Counts code lines (not blank, comment or docstring) of the six files and the folders; fails above the caps.

    python tests/sizes.py
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CAPS = {"one of the six": 470, "the six": 2050, "files, sources, runtime": 2200, "an example": 350}


def docstring_lines(tree):
    """Numbers of the lines that docstrings stand on."""
    found = set()
    for node in ast.walk(tree):
        may_have_one = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if may_have_one and ast.get_docstring(node) is not None:
            found.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def code_lines(path):
    source = path.read_text(encoding="utf-8")
    skipped = docstring_lines(ast.parse(source))
    count = 0
    for number, line in enumerate(source.splitlines(), 1):
        line = line.strip()
        count += bool(line) and not line.startswith("#") and number not in skipped
    return count


def main():
    six = {path.name: code_lines(path) for path in sorted(ROOT.glob("*.py"))}
    folders = {}
    for folder in ("files", "sources", "runtime"):
        folders[folder] = sum(code_lines(path) for path in ROOT.glob(f"{folder}/*.py"))
    examples = {path.name: code_lines(path) for path in sorted(ROOT.glob("examples/*.py"))}
    sizes = {
        "one of the six": max(six.values()),
        "the six": sum(six.values()),
        "files, sources, runtime": sum(folders.values()),
        "an example": max(examples.values()),
    }
    print(six, folders, examples)
    for name, size in sizes.items():
        print(f"{name}: {size} code lines, at most {CAPS[name]}")
    sys.exit(any(size > CAPS[name] for name, size in sizes.items()))


if __name__ == "__main__":
    main()
