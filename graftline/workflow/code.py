"""The code of a stage as one digest: the modules that it imports, and the versions of the libraries that compute.

DVC does not follow imports. Naming folders in dvc.yaml would rerun every stage for a comment in one file, and a project
that installs graftline has no such folders. So a module's digest leaves out comments, docstrings, type hints, log lines
and error messages, and the modules of `MACHINERY`, which do not affect results, are left out. Settings count by value
(`graftline.workflow.stage_settings`), not by the code that reads them.
"""

import ast
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import graftline
from graftline.digest import of_json
from graftline.workflow.script import syntax_tree

_PACKAGE, _API, _OF_PACKAGE = "graftline", "graftline.api", "::"
MACHINERY = frozenset(
    # The package's __init__ imports the API lazily; see `of_stage`.
    _PACKAGE if name == _PACKAGE else f"{_PACKAGE}.{name}"
    for name in (
        _PACKAGE,
        *("errors", "extras", "logs", "plain_text", "program", "tracing"),
        # These read pipelines.yaml, which is recorded by value.
        *("settings", "settings.classify", "settings.loader", "settings.rules", "settings.tree"),
        # These run around a stage, and before it.
        *("workflow.stage", "workflow.resolve"),
        # These refuse a run or let it pass, and change nothing.
        *("plan.experts", "plan.served", "plan.stage_memory"),
        # Where a training's processes run and its checkpoints are copied to.
        *("ray_cluster", "train.ray_workers", "workflow.kept_checkpoints"),
    )
)

LIBRARIES = frozenset(
    (
        *(
            "bitsandbytes",
            "great_expectations",
            "jinja2",
            "jsonschema",
            "lm_eval",
            "numpy",
            "onnx",
            "onnxruntime",
            "peft",
        ),
        *("safetensors", "scipy", "tokenizers", "torch", "transformers"),
    )
)
"""Packages whose version can change a stage's results."""

_DISTRIBUTIONS = {"onnxruntime": ("onnxruntime-gpu", "onnxruntime")}

_DATA_FILE = re.compile(r"[\w-]+\.(?:css|html|json|md|txt|yaml)")

Read = Callable[[str], bytes | None]
"""The bytes of a file by its path below the project's root, with forward slashes; None if there is none."""


@dataclass(frozen=True)
class Code:
    """The code that a stage runs."""

    modules: dict[str, str]
    """SHA-256 of each module's code, by module, and of data files in its package that it names, by path."""
    libraries: dict[str, str]
    """Installed versions, by imported package."""

    @property
    def digest(self) -> str:
        """One digest of everything."""
        return str(of_json({"modules": self.modules, "libraries": self.libraries}))


def of_stage(stage: str, read: Read) -> Code:
    """The code of ``tasks.<stage>``: modules of the project and of graftline that it may import, and libraries.

    Imports inside functions count, as do modules that are named in a string (``"graftline.adapters.lora"``).
    """
    return of_modules([f"tasks.{stage}"], read)


def of_modules(names: Iterable[str], read: Read) -> Code:
    """These modules with every module that they may import, and libraries; as `of_stage`."""
    found: dict[str, str] = {}
    libraries: set[str] = set()
    todo = list(names)
    while todo:
        name, is_of_package = _plain_name(todo.pop())
        if name in found or name in MACHINERY:
            continue
        source = _source(name, read)
        if source is None:
            libraries |= {name.partition(".")[0]} & LIBRARIES
            todo += [_API] if is_of_package else []
            continue
        meaning = _meaning(source, name)
        found[name] = meaning.digest
        found |= _data_files(name, meaning.texts, read)
        # Importing a.b also runs a.
        todo += [*meaning.imports, *_parents(name)]
    versions = {name: version for name in sorted(libraries) if (version := _version(name))}
    return Code(modules=dict(sorted(found.items())), libraries=versions)


def _data_files(module: str, texts: tuple[str, ...], read: Read) -> dict[str, str]:
    """Files in a module's package that it names (templates, styles), and those that they name."""
    places = [above.replace(".", "/") for above in (module, *_parents(module))]
    found: dict[str, str] = {}
    todo = list(texts)
    while todo:
        text = todo.pop()
        for path in (f"{place}/{below}{text}" for place in places for below in ("", "templates/")):
            if path not in found and (content := _read_either(path, read)) is not None:
                found[path] = hashlib.sha256(content).hexdigest()
                todo += _DATA_FILE.findall(content.decode("utf-8", "replace"))
    return found


def _read_either(path: str, read: Read) -> bytes | None:
    """A file of the project, else of the installed graftline."""
    if (content := read(path)) is not None or not _is_installed(path, read):
        return content
    return in_folder(Path(graftline.__file__).parent)(path.removeprefix("graftline/"))


def _is_installed(path: str, read: Read) -> bool:
    return path.startswith("graftline/") and read("graftline/__init__.py") is None


def _plain_name(name: str) -> tuple[str, bool]:
    """A module's name, and whether it may be a name of the API instead: ``from graftline import train_adapter``."""
    return name.replace(_OF_PACKAGE, "."), _OF_PACKAGE in name


def in_folder(root: Path) -> Read:
    """Reads the files of a checkout."""

    def read(path: str) -> bytes | None:
        try:
            return (root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    return read


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Modules or libraries that were added, removed or changed, sorted."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _source(name: str, read: Read) -> bytes | None:
    """A module's source: the project's first, as Python finds it, else the installed graftline's."""
    path = name.replace(".", "/")
    for candidate in (f"{path}.py", f"{path}/__init__.py"):
        if (source := _read_either(candidate, read)) is not None:
            return source
    return None


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


@lru_cache(maxsize=64)
def _version(package: str) -> str | None:
    for distribution in _DISTRIBUTIONS.get(package, (package.replace("_", "-"),)):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


@dataclass(frozen=True)
class _Meaning:
    digest: str
    imports: tuple[str, ...]
    """Names that may be modules: ``from a import b`` may import a.b."""
    texts: tuple[str, ...]
    """Strings that may name data files."""


@lru_cache(maxsize=4096)
def _meaning(source: bytes, name: str) -> _Meaning:
    """A module's digest and imports; one that cannot be parsed counts by its bytes."""
    try:
        tree = _Bare(is_settings=name.startswith("graftline.settings.")).visit(syntax_tree(source))
    except (SyntaxError, ValueError):
        return _Meaning(hashlib.sha256(source).hexdigest(), (), ())
    code = ast.unparse(ast.fix_missing_locations(_filled(tree))).encode("utf-8", "surrogatepass")
    constants = {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    texts = tuple(sorted(text for text in constants if _DATA_FILE.fullmatch(text)))
    return _Meaning(hashlib.sha256(code).hexdigest(), tuple(sorted(set(_imports(tree, name)))), texts)


def _imports(tree: ast.AST, name: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (_API if alias.name == _PACKAGE else alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                origin = ".".join(filter(None, [*name.split(".")[: -node.level], origin]))
            yield origin
            joint = _OF_PACKAGE if origin == _PACKAGE else "."
            yield from (f"{origin}{joint}{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("graftline."):
            yield node.value


class _Bare(ast.NodeTransformer):
    """Removes everything that has no effect on results."""

    def __init__(self, *, is_settings: bool) -> None:
        self.is_settings = is_settings

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """Docstrings and log lines."""
        return None if isinstance(node.value, ast.Constant) or _is_log_line(node.value) else self.generic_visit(node)

    def visit_Pass(self, node: ast.Pass) -> None:
        """Dropped; `_filled` adds those that the syntax requires."""

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        """The class of what is raised counts, not the message."""
        return ast.Raise(exc=self.visit(node.exc) if node.exc else None, cause=None)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """The message of an error that is constructed does not count."""
        name = ast.unparse(node.func)
        return node.func if name.endswith(("Error", "Warning", "Exit")) else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        """Imports for the type checker do not count."""
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return [kept for other in node.orelse if (kept := self.visit(other))]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        """Type hints of arguments do not count."""
        return ast.arg(arg=node.arg)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """The type hint of the result does not count."""
        node.returns = None
        return self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        """As for other functions."""
        node.returns = None
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Only methods of a settings section count: its fields, and so their validators, are recorded by value."""
        if self.is_settings:
            node.body = [item for item in node.body if not _is_field(item)]
        return self.generic_visit(node)


def _filled(tree: ast.AST) -> ast.AST:
    """The tree with `pass` in every block that became empty."""
    for node in ast.walk(tree):
        if getattr(node, "body", None) == [] and not isinstance(node, ast.Module):
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
    return tree


def _is_log_line(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("logger", "logging", "warnings")
    )


def _is_field(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return any("validator" in ast.unparse(decorator) for decorator in node.decorator_list)
    return isinstance(node, ast.AnnAssign | ast.Assign)
