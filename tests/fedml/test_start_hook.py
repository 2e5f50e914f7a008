"""The start-up hook by itself: fast, no FedML."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import _fedmosaic_hook as hook
import pytest


@pytest.fixture
def target(tmp_path, monkeypatch):
    """A module on disk that the hook waits for, and the list of modules it was called with."""
    (tmp_path / "fm_fake_target.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[ModuleType] = []
    patcher = ModuleType("fm_fake_patcher")
    patcher.extend = seen.append
    monkeypatch.setitem(sys.modules, "fm_fake_patcher", patcher)
    monkeypatch.setattr(hook, "TARGETS", ("fm_fake_target",))
    monkeypatch.setattr(hook, "_PATCHER", "fm_fake_patcher")
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not _is_ours(f)])
    yield seen
    sys.modules.pop("fm_fake_target", None)


def _is_ours(finder: object) -> bool:
    return type(finder).__name__ == "FedMosaicFinder"


def test_a_target_is_extended_after_it_ran(target):
    hook.install()
    assert target == []
    module = importlib.import_module("fm_fake_target")
    assert target == [module]
    assert module.VALUE == 1


def test_a_reload_is_not_extended_by_the_old_loader(target):
    hook.install()
    module = importlib.import_module("fm_fake_target")
    loader = module.__spec__.loader
    assert "exec_module" not in vars(loader)


def test_install_is_idempotent(target):
    hook.install()
    hook.install()
    assert sum(map(_is_ours, sys.meta_path)) == 1


def test_a_target_that_is_imported_already_is_extended_at_once(target):
    module = importlib.import_module("fm_fake_target")
    hook.install()
    assert target == [module]


def test_other_modules_are_none_of_its_business(target):
    finder = hook.FedMosaicFinder()
    assert finder.find_spec("json") is None
    assert finder.find_spec("fm_fake_target_2") is None


def test_finders_that_ask_each_other_come_to_an_end(target):
    hook.install()

    class Other:
        def find_spec(self, name, path=None, target=None):
            others = [f for f in sys.meta_path if f is not self]
            specs = (f.find_spec(name, path, target) for f in others)
            return next((spec for spec in specs if spec), None)

    sys.meta_path.insert(0, Other())
    importlib.import_module("fm_fake_target")
    assert len(target) == 1


def test_a_missing_target_stays_missing(target, monkeypatch):
    monkeypatch.setattr(hook, "TARGETS", ("fm_no_such_module",))
    hook.install()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fm_no_such_module")


def test_an_error_of_ours_is_one_line_and_the_import_succeeds(target, monkeypatch, capsys):
    def fail(module):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(sys.modules["fm_fake_patcher"], "extend", fail)
    hook.install()
    assert importlib.import_module("fm_fake_target").VALUE == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "fm_fake_target not extended: RuntimeError: two lines" in captured.err


def test_an_error_of_the_target_is_its_own(target, tmp_path):
    (tmp_path / "fm_fake_target.py").write_text("raise KeyError('its own')\n")
    hook.install()
    with pytest.raises(KeyError, match="its own"):
        importlib.import_module("fm_fake_target")
    assert target == []


def test_start_up_imports_nothing_but_itself():
    folder = str(Path(hook.__file__).parent)
    code = (
        f"import sys; sys.path.insert(0, {folder!r}); before = set(sys.modules);"
        "import _fedmosaic_hook; _fedmosaic_hook.install();"
        "print(sorted(set(sys.modules) - before))"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['_fedmosaic_hook']"
    assert done.stderr == ""


def test_python_starts_with_the_hook_and_without_the_package():
    code = (
        "import sys; print('_fedmosaic_hook' in sys.modules,"
        " any(name.startswith('fedml') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
