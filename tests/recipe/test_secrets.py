"""Nothing that opens a door is printed."""

import pytest

from framework.recipe.secrets import mask_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pa55word@host/simple", "https://***@host/simple"),
        ("git+ssh://token123@host/x and more", "git+ssh://***@host/x and more"),
        ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer ***"),
        ("https://host/x?token=abc123&a=b", "https://host/x?token=***&a=b"),
        ("hf_abcdefghijklmnopqrst", "***"),
        ("hf://org/name@main/file.gguf", "hf://org/name@main/file.gguf"),
        ("/models/a@b/c.gguf", "/models/a@b/c.gguf"),
        ("pypi://pkg==1.0/f", "pypi://pkg==1.0/f"),
        ("12 tokens: 3, stop at length", "12 tokens: 3, stop at length"),
        ("max_new_tokens=64", "max_new_tokens=64"),
    ],
)
def test_credentials_are_masked_and_names_are_not(text, shown):
    assert mask_secrets(text) == shown


def test_values_of_secret_environment_variables_are_masked(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-value")
    monkeypatch.setenv("PLAIN", "plain-value")
    assert mask_secrets("a s3cr3t-value b plain-value") == "a *** b plain-value"
