"""The hash of a user's code: what changes it and what does not."""

import importlib
import sys
from pathlib import Path

import pytest

from moe.config import named_modules
from moe.config.parse import from_config_dict
from moe.config.user_code import user_code
from moe.configs import base
from moe.lab.identity import canonical
from tests.helpers import set_moe

HELPERS = '''"""Helpers."""

def sharpen(weights):
    return weights**2

def unused():
    return 1
'''
GATES = '''"""Gates."""
import dataclasses
import helpers.powers
import jax
from helpers.weights import sharpen as sharper
from moe import Gate, GateOutput
from moe.routing.interface import top_k

POWER = 2.0
TABLE = []
TABLE.append(1)

if POWER > 1:
    LIMIT = 3
else:
    LIMIT = 4

class Layer:
    pass

class Ruled(Gate):
    layer = Layer

    def route(self, router_logits, inputs):
        """The rule."""
        weights, index = top_k(router_logits, self.k)
        return GateOutput(index, sharper(jax.nn.softmax(weights * POWER * helpers.powers.ONE)))

@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(Ruled):
    k: int = LIMIT  # K

@dataclasses.dataclass(frozen=True, kw_only=True)
class Other(Gate):
    k: int = 2

    def route(self, router_logits, inputs):
        return GateOutput(*top_k(router_logits, self.k)[::-1])

mine = Mine(k=2)

def my_optimizer(schedule, config):
    import optax
    return optax.sgd(schedule)
'''


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Function that writes the modules with texts replaced, for the next import."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "helpers").mkdir()

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] in ("user_gates", "helpers")]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def write(old="", new="", powers="ONE = 1\n"):
        forget()
        assert old in GATES + HELPERS
        (tmp_path / "user_gates.py").write_text(GATES.replace(old, new) if old else GATES)
        (tmp_path / "helpers" / "weights.py").write_text(HELPERS.replace(old, new) if old else HELPERS)
        (tmp_path / "helpers" / "powers.py").write_text(powers)
        for path in tmp_path.rglob("*.pyc"):
            path.unlink()

    yield write
    forget()


def config_with(gate="user_gates:Mine", optimizer="adamw"):
    tree = base.get_config()
    set_moe(tree, gate=gate)
    tree.update_from_flattened_dict({"optimizer.name": optimizer})
    return from_config_dict(tree)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("POWER = 2.0", "POWER = 3.0"),  # a constant that the rule reads
        ("TABLE.append(1)", "TABLE.append(2)"),  # may change what the rule reads
        ("LIMIT = 3", "LIMIT = 3.0"),  # defined inside of a compound statement
        ("softmax", "log_softmax"),  # in an inherited method
        ("class Layer:\n    pass", "class Layer:\n    size = 2"),
        ("weights**2", "weights**3"),  # in a module that is imported
    ],
)
def test_an_edit_of_what_a_gate_reaches_changes_the_hash(write, old, new):
    write()
    before = user_code(config_with("user_gates:mine"))
    assert len(before) == 16
    write(old, new)
    assert user_code(config_with("user_gates:mine")) not in ("", before)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # K", "  # the number of choices"),
        ('"""The rule."""', '"""Mixtral\'s rule."""'),
        ('"""Gates."""', ""),
        ("POWER = 2.0", "POWER   = 2.0\n\n"),
        ("[::-1]", ""),  # another gate
        ("optax.sgd", "optax.lion"),
        ("return 1", "return 2"),  # not imported
    ],
)
def test_other_edits_do_not(write, old, new):
    write()
    before = user_code(config_with())
    write(old, new)
    assert user_code(config_with()) == before != ""


def test_a_module_that_is_imported_by_its_own_name_counts_as_a_whole(write):
    write()
    before = user_code(config_with())
    write(powers="ONE = 1\nTWO = 2\n")
    assert user_code(config_with()) != before


RULE = """import dataclasses
import jax
from moe import Gate, GateOutput
from moe.routing.interface import top_k
{imports}

def make(power):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(Gate):
        k: int = 2

        def route(self, router_logits, inputs):
            weights, index = top_k(router_logits, self.k)
            return GateOutput(index, jax.nn.softmax(weights * POWER * power))

    return Mine(k=2)

{rest}
"""

HELD = """import dataclasses
import jax
from moe import Gate, GateOutput
from moe.routing.interface import top_k

class Outer:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(Gate):
        k: int = 2

        def route(self, router_logits, inputs):
            weights, index = top_k(router_logits, self.k)
            return GateOutput(index, jax.nn.{rule}(weights))

mine = Outer.Mine(k=2)
"""


@pytest.fixture
def hash_of(tmp_path, monkeypatch):
    """Function that writes modules to a folder, imports them anew, and returns the hash of a gate in one of them."""
    folder = tmp_path / "site-packages"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] in ("own_rules", "powers_of_others")]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def hashed(gate, **texts):
        forget()
        for name, text in texts.items():
            path = folder / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return user_code(config_with(gate))

    yield hashed
    forget()


def test_what_a_package_imports_from_itself_counts_although_it_is_installed(hash_of):
    rule = RULE.format(imports="from .powers import POWER", rest="mine = make(1)")
    first, second = (
        hash_of("own_rules.gates:mine", own_rules__gates=rule, own_rules__powers=f"POWER = {power}\n")
        for power in (2.0, 3.0)
    )
    assert "" != first != second


def test_what_an_installed_package_has_does_not_count(hash_of):
    rule = RULE.format(imports="from powers_of_others import POWER", rest="mine = make(1)")
    first, second = (
        hash_of("own_rules:mine", own_rules=rule, powers_of_others=f"POWER = {power}\n") for power in (2.0, 3.0)
    )
    assert "" != first == second


def test_classes_that_a_function_or_a_class_holds(hash_of):
    """The function's arguments are somewhere in its module, which counts as a whole; so does the outer class."""
    rules = [RULE.format(imports="POWER = 2.0", rest=f"mine = make({power})") for power in (2, 3)]
    first, second = (hash_of("own_rules:mine", own_rules=rule) for rule in rules)
    assert "" != first != second
    rules = [HELD.format(rule=rule) for rule in ("softmax", "log_softmax")]
    first, second = (hash_of("own_rules:mine", own_rules=rule) for rule in rules)
    assert "" != first != second


def test_the_optimizer_counts(write):
    write()
    before = user_code(config_with("switch", "user_gates:my_optimizer"))
    write("optax.sgd", "optax.lion")
    assert user_code(config_with("switch", "user_gates:my_optimizer")) not in ("", before)
    assert user_code(config_with("switch")) == user_code(config_with("none")) == ""


def test_a_run_is_identified_by_the_code_that_was_imported(write):
    write()
    form = canonical(config_with())
    assert form["code"] == user_code(config_with())
    assert "code" not in canonical(config_with("switch"))
    Path(str(sys.modules["user_gates"].__file__)).write_text("")
    assert canonical(config_with()) == form
    write("POWER = 2.0", "POWER = 3.0")
    assert canonical(config_with()) == {**form, "code": user_code(config_with())} != form


@pytest.mark.parametrize(
    ("named", "importer", "is_found"), [("mine.gates", "mine", True), ("moe.layers", "moe", False)]
)
def test_only_a_users_modules_import_from_a_users_folders(tmp_path, monkeypatch, named, importer, is_found):
    """A module of this package may be named too, which must not make a torch.py of the folder run."""
    (tmp_path / "not_installed.py").write_text("")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(named_modules, "_importer", lambda: importer)
    finder = named_modules.NamedModules()
    finder.search(tmp_path)
    finder.name(named)
    assert (finder.find_spec("not_installed") is not None) == is_found
