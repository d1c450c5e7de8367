"""The values of a report behave as plain frozen dataclasses."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from closewait_guard.model import Finding, Frame, Observation, Severity, Verdict
from closewait_guard.settings import Settings

SEEN = Observation(*range(len(fields(Observation))))


@pytest.mark.parametrize("cls", [Finding, Observation])
def test_the_signature_shows_the_fields_and_their_types(cls):
    parameters = inspect.signature(cls).parameters
    assert list(parameters) == [field.name for field in fields(cls)]
    assert all(parameter.annotation != parameter.empty for parameter in parameters.values())


def test_each_field_gets_its_value_or_its_default():
    finding = Finding(SEEN, Verdict.LEAKED, hint="close it", severity=Severity.INFO, holders=())
    assert (finding.observation, finding.verdict) == (SEEN, Verdict.LEAKED)
    assert (finding.severity, finding.holders, finding.hint) == (Severity.INFO, (), "close it")
    assert (finding.replaced_by, finding.count) == (None, 1)


def test_values_can_be_replaced_and_not_changed():
    assert replace(SEEN, fd=7).fd == 7
    with pytest.raises(FrozenInstanceError):
        SEEN.fd = 7


@pytest.mark.parametrize(
    "value", [SEEN, Frame("a.py", 1, "f", "a"), Settings()], ids=lambda it: type(it).__name__
)
@pytest.mark.parametrize("name", ["grace", "fd", "serial", "no_such_field", "__dict__"])
def test_no_attribute_of_a_value_can_be_set_or_deleted_whether_it_is_a_field_or_not(value, name):
    message = f"cannot change '{name}' of a {type(value).__name__}: use dataclasses.replace()"
    with pytest.raises(FrozenInstanceError) as refused:
        setattr(value, name, 7)
    assert str(refused.value) == message
    with pytest.raises(FrozenInstanceError) as refused:
        delattr(value, name)
    assert str(refused.value) == message


def test_a_value_that_is_missing_or_unknown_is_named():
    with pytest.raises(TypeError, match="'severity', 'holders', and 'hint'"):
        Finding(SEEN, Verdict.LEAKED)
    with pytest.raises(TypeError, match="'no_such_field'"):
        Finding(SEEN, Verdict.LEAKED, Severity.INFO, (), "", no_such_field=1)
