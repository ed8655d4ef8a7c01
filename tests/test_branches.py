"""Names of branches, against git itself."""

import subprocess

import pytest

from streammerge.branches import branch_flaw

# fmt: off
NAMES = [
    "main", "v1.0", "feature/x", "a@b", "caf\u00e9", "a.b/c.d", "x{", "@x", "a-", "HEAD", "@", "-x", "bad branch",
    "v1..x", "/x", "x/", "a//b", "x.lock", "a.lock/b", ".x", "a/.b", "x.", "a./b", "x\ty", "x\x7fy", "a~b", "a^b",
    "a:b", "a?b", "a*b", "a[b", "a\\b", "a@{b", "x.locks", "lock", "headless", "HEAD/x", "refs/pr/1",
]
# fmt: on


@pytest.mark.parametrize("name", NAMES)
def test_git_says_the_same(name: str) -> None:
    # `--branch` would look "@" up in the reflog of a repository
    arguments = ["check-ref-format", "--branch", name] if name != "@" else ["check-ref-format", name]
    done = subprocess.run(["git", *arguments], capture_output=True, cwd="/", check=False)
    assert (branch_flaw(name) is None) == (done.returncode == 0), done


def test_what_no_command_line_can_hold() -> None:
    assert branch_flaw("") == "it is empty"
    assert branch_flaw("a\0b") == r"it has the character '\x00' in it"
