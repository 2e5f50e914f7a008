"""Start-up hook: FedML learns this plugin's names when, and only when, FedML is imported.

A ``.pth`` file runs :func:`install` at every start of Python, so this module imports nothing but
``sys`` and does nothing but put one finder on ``sys.meta_path``. The finder answers for the few
FedML modules that the plugin extends: it lets the ordinary finders load them and then calls
``fedml_plugin_fedmosaic.integrations.fedml.hook``. If anything fails, FedML stays as it is and one
line on standard error says so.
"""

import sys

TARGETS = ("fedml", "fedml.cli.modules.run", "fedml.simulation.simulator")
_PATCHER = "fedml_plugin_fedmosaic.integrations.fedml.hook"


def _extend(module):
    """Hands a freshly imported FedML module to the plugin; never raises."""
    try:
        from importlib import import_module

        import_module(_PATCHER).extend(module)
    except Exception as error:  # FedML must keep working, whatever is wrong with the plugin.
        text = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(f"fedml-plugin-fedmosaic: {module.__name__} not extended: {text}", file=sys.stderr)


def _extend_after_exec(loader):
    """Makes one loader call :func:`_extend` once, after it has run its module."""
    original = loader.exec_module

    def exec_module(module):
        # Back to normal first: a reload, or another module of the same loader, is not ours.
        del loader.exec_module
        original(module)
        _extend(module)

    loader.exec_module = exec_module


class FedMosaicFinder:
    """Answers for the modules in ``TARGETS`` only."""

    def __init__(self):
        # Names being resolved. Each name is under its own import lock, so this is thread-safe, and
        # two plugins whose finders ask each other come to an end.
        self._resolving = set()

    def find_spec(self, name, path=None, target=None):
        """The ordinary spec of a target with a loader that extends it; None for other modules."""
        if name not in TARGETS or name in self._resolving:
            return None
        self._resolving.add(name)
        try:
            for finder in sys.meta_path:
                find_spec = getattr(finder, "find_spec", None)
                spec = None if find_spec is None else find_spec(name, path, target)
                if spec is not None:
                    break
            else:
                return None
        finally:
            self._resolving.discard(name)
        try:
            _extend_after_exec(spec.loader)
        except AttributeError:  # A loader of someone else's that takes no attributes.
            print(f"fedml-plugin-fedmosaic: cannot extend {name}", file=sys.stderr)
        return spec


def install():
    """Puts the finder first on ``sys.meta_path``; extends targets that are already imported.

    May be called any number of times.
    """
    try:
        if not any(type(finder).__name__ == "FedMosaicFinder" for finder in sys.meta_path):
            sys.meta_path.insert(0, FedMosaicFinder())
        for name in TARGETS:
            module = sys.modules.get(name)
            spec = getattr(module, "__spec__", None)
            # A module whose import is still running is extended by the finder, or not at all.
            if module is not None and not getattr(spec, "_initializing", False):
                _extend(module)
    except Exception as error:  # Nothing here may stop Python from starting.
        print(f"fedml-plugin-fedmosaic: start-up hook failed: {error}", file=sys.stderr)


def uninstall():
    """Takes the finder away again; what is already extended stays so."""
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "FedMosaicFinder"]
