"""The list of guarantees fits the package and the tests, and functions are broken as the list expects."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import transferkit as tk
from mutants import find_definition, mutants
from run_mutations import Guarantee, find_tests, mutants_of, read_guarantees

PACKAGE = Path(tk.__file__).parent


@pytest.mark.parametrize("guarantee", read_guarantees(), ids=lambda guarantee: guarantee.definition)
def test_what_the_list_names_is_there(guarantee: Guarantee) -> None:
    """Each definition lies in exactly one module and can be broken as its equivalent mutants say; its tests exist."""
    found = list(mutants_of(guarantee, PACKAGE))
    assert len({mutant.path for mutant in found}) == 1
    assert guarantee.equivalent - {mutant.label for mutant in found} == set()
    assert find_tests(guarantee.tests)


def test_a_test_that_is_gone_is_an_error() -> None:
    """A name that neither a test nor a file of tests has is refused."""
    with pytest.raises(LookupError, match="test_that_is_gone"):
        find_tests("test_mutations test_that_is_gone")


SOURCE = '''
class Account:
    def pay(self, amount: int = 1, *, twice: bool = False) -> int:
        """Pay an amount."""
        if amount < 0 and not twice:
            raise ValueError(f"{amount - 1} is below 0")
        with lock, log as lines:
            self.paid = amount[1:]
        try:
            write(lines, copy.deepcopy(self), flush=True)
        except OSError:
            self.say("failed")
            raise
        return self.paid if twice else max(0, amount + 2)
'''

CHANGES = """
never: amount < 0 and (not twice) | if False:
drop: amount < 0 | if not twice:
drop: not twice | if amount < 0:
boundary: amount < 0 | if amount <= 0 and (not twice):
constant: amount < 0 | if amount < 1 and (not twice):
drop: lock | with log as lines:
delete: self.paid = amount[1:] | pass
slice: amount[1:] | self.paid = amount[:]
constant: 1: | self.paid = amount[2:]
delete: write(lines, copy.deepcopy(self), flush=True) | pass
unwrap: copy.deepcopy(self) | write(lines, self, flush=True)
unhandled: except OSError:
delete: raise | pass
return: return self.paid if twice else max(0, amount + 2) | return None
never: twice | return self.paid if False else max(0, amount + 2)
always: twice | return self.paid if True else max(0, amount + 2)
unwrap: max(0, amount + 2) | return self.paid if twice else 0
unwrap: max(0, amount + 2) | return self.paid if twice else amount + 2
constant: max(0, amount + 2) | return self.paid if twice else max(1, amount + 2)
arithmetic: amount + 2 | return self.paid if twice else max(0, amount - 2)
constant: amount + 2 | return self.paid if twice else max(0, amount + 3)
"""


def test_a_function_is_broken_in_each_way_once() -> None:
    """Every part that does something is changed alone; docstrings, defaults, annotations and messages are not."""
    module = ast.parse(SOURCE)
    definition = find_definition(module, "Account.pay")
    assert definition is not None
    before = ast.unparse(module)
    found = []
    for label, after in mutants(module, definition):
        added = Counter(after.splitlines()) - Counter(before.splitlines())
        found.append(" | ".join([label, *(line.strip() for line in added)]))
    assert found == CHANGES.strip().splitlines()
    assert ast.unparse(module) == before
    assert find_definition(module, "Account.refund") is None
