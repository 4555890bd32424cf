"""What is printed, and what never is."""

from megatron_flexsp.doctor.findings import as_json, error, exit_code, ok, warning, without_secrets


def test_secrets_are_never_shown() -> None:
    words = ["WANDB_API_KEY=0123456789", "x.py", "--hf-token", "hf_abcdef", "--tokenizer-model", "vocabulary"]
    found = [error("x", "0123456789 and hf_abcdef of vocabulary", "see s3cretvalue")]
    (shown,) = without_secrets(found, words, {"SOME_PASSWORD": "s3cretvalue", "HOME": "/home/me"})
    assert (shown.found, shown.remedy) == ("*** and *** of vocabulary", "see ***")


def test_the_exit_code_and_the_json_follow_from_the_findings() -> None:
    findings = [ok("a", "well"), warning("b", "hm", "do this")]
    assert exit_code(findings) == 0
    assert exit_code([*findings, error("c", "no", "do that")]) == 1
    assert as_json(findings) == {
        "schema": "flexsp.doctor/1",
        "findings": [
            {"check": "a", "status": "ok", "found": "well", "remedy": ""},
            {"check": "b", "status": "warning", "found": "hm", "remedy": "do this"},
        ],
    }
