"""Both parts of an error go where the error goes, and make one message."""

import pickle

import pytest

from megatron_flexsp.errors import FlexSPError, named_by_flags


def test_the_remedy_is_a_sentence_of_the_message() -> None:
    assert str(FlexSPError("--seq-length 9 is odd", "raise it")) == "--seq-length 9 is odd. Raise it"
    assert str(FlexSPError("9 ranks are odd", "--seq-length 8 helps")) == "9 ranks are odd. --seq-length 8 helps"
    assert str(FlexSPError("the file is empty")) == "the file is empty"


def test_both_parts_reach_another_process() -> None:
    arrived = pickle.loads(pickle.dumps(FlexSPError("9 ranks are odd", "use 8")))
    assert (arrived.found, arrived.remedy) == ("9 ranks are odd", "use 8")


def test_a_front_end_names_its_flags() -> None:
    @named_by_flags({"capacity": "--max-tokens"})
    def refuse() -> None:
        raise FlexSPError("a `capacity` of 0", "raise `capacity`, or run `flexsp profile` with `other`")

    with pytest.raises(FlexSPError) as refusal:
        refuse()
    parts = (refusal.value.found, refusal.value.remedy)
    assert parts == ("a --max-tokens of 0", "raise --max-tokens, or run `flexsp profile` with `other`")
