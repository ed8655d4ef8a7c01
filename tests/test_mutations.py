"""Every guard against hostile input is needed: with the guard taken out of a copy of the package, its test fails.

The copy is tested in a process of its own, so that no patched module is left in this one.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# what is guarded: (module, the guard, what stands there instead, a test that must fail then)
MUTATIONS: dict[str, tuple[str, str, str, str]] = {
    "length of a header": (
        "checkpoints/header.py",
        "if length > MAX_HEADER_BYTES:",
        "if False:",
        "checkpoints/test_header.py::test_an_absurd_header_length_is_refused_whatever_the_file_size",
    ),
    "header and file": (
        "checkpoints/header.py",
        "if 8 + length > file_size:",
        "if False:",
        "checkpoints/test_header.py::test_a_header_longer_than_the_file",
    ),
    "length of an entry": (
        "checkpoints/header_text.py",
        "limit = position + (MAX_METADATA if notes else MAX_ENTRY)",
        "limit = len(text)",
        "checkpoints/test_header.py::test_a_hostile_header_takes_little_more_than_its_length",
    ),
    "number of tensors": (
        "checkpoints/header.py",
        "if len(infos) == MAX_TENSORS:",
        "if False:",
        "checkpoints/test_header.py::test_the_number_of_tensors_is_limited",
    ),
    "number of dimensions": (
        "checkpoints/header.py",
        "if len(shape) > MAX_DIMENSIONS:",
        "if False:",
        "checkpoints/test_header.py::test_a_malformed_header_is_refused",
    ),
    "overflow of a product": (
        "checkpoints/header.py",
        "if numel >= 2**63:",
        "if False:",
        "checkpoints/test_header.py::test_a_malformed_header_is_refused",
    ),
    "names twice": (
        "checkpoints/header_text.py",
        "if name in seen:",
        "if False:",
        "checkpoints/test_header.py::test_a_malformed_header_is_refused",
    ),
    "keys twice": (
        "checkpoints/json_text.py",
        "if len(result) < len(pairs):",
        "if False:",
        "checkpoints/test_checkpoint.py::test_a_bad_index_is_refused",
    ),
    "names in Unicode": (
        "checkpoints/weight_files.py",
        "if reason := bad_tensor_name(name):",
        "if reason := None:",
        "fuzz/test_fuzz.py::test_the_corpus",
    ),
    "depth of JSON": (
        "checkpoints/json_text.py",
        "if _depth_exceeds(value, MAX_DEPTH):",
        "if False:",
        "checkpoints/test_checkpoint.py::test_a_bad_index_is_refused",
    ),
    "number of values of JSON": (
        "checkpoints/json_text.py",
        "> MAX_VALUES:",
        "< 0:",
        "checkpoints/test_checkpoint.py::test_a_bad_index_is_refused",
    ),
    "names in an index": (
        "checkpoints/weight_files.py",
        "if reason := unsafe_name(file):",
        "if reason := None:",
        "checkpoints/test_checkpoint.py::test_a_bad_index_is_refused",
    ),
    "names of side files": (
        "checkpoints/side_files.py",
        "if reason := unsafe_name(name):",
        "if reason := None:",
        "test_hostile.py::test_side_files_that_are_not_copied",
    ),
    "links among side files": (
        "checkpoints/side_files.py",
        "if files.leads_out(name):",
        "if False:",
        "test_hostile.py::test_side_files_that_are_not_copied",
    ),
    "names by case and form": (
        "checkpoints/side_files.py",
        "if pair := clash([*names, *ours]):",
        "if pair := None:",
        "test_hostile.py::test_side_files_that_are_not_copied",
    ),
    "size of side files": (
        "checkpoints/side_files.py",
        "if total > MAX_SIDE_BYTES:",
        "if False:",
        "test_hostile.py::test_side_files_are_limited_in_size",
    ),
    "links in an output": (
        "checkpoints/output.py",
        "if (link := _foreign_link(folder)) is not None:",
        "if (link := None) is not None:",
        "test_hostile.py::test_an_unfinished_folder_with_links_is_not_written",
    ),
    "names in a manifest": (
        "checkpoints/output.py",
        "if any(unsafe_name(name) or",
        "if False and any(unsafe_name(name) or",
        "test_hostile.py::test_overwriting_removes_nothing_elsewhere",
    ),
    "links in what is pushed": (
        "hub/push.py",
        "if not stays_inside(folder, name):",
        "if False:",
        "test_hostile.py::test_what_is_pushed_is_in_the_folder",
    ),
    "names in a listing": (
        "hub/repository.py",
        "if reason := unsafe_name(name):",
        "if reason := None:",
        "test_hostile.py::test_a_listing_that_would_lead_out_of_the_cache",
    ),
    "a commit is no path": (
        "hub/repository.py",
        'if not re.fullmatch(r"[0-9a-f]{6,64}", info["sha"]):',
        "if False:",
        "test_hostile.py::test_a_listing_that_would_lead_out_of_the_cache",
    ),
    "code of a tokenizer": (
        "fisher/probes.py",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=False)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "test_hostile.py::test_a_models_code_is_copied_and_never_run",
    ),
    "code of a model": (
        "fisher/blocks.py",
        "AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=True)",
        "test_hostile.py::test_code_runs_where_it_is_asked_for",
    ),
    "aliases of YAML": (
        "yaml_text.py",
        "self._count += self._sizes[id(node)]",
        "pass",
        "test_yaml_text.py::test_what_is_refused",
    ),
    "tags of YAML": (
        "yaml_text.py",
        'getattr(event, "tag", None) is not None:',
        "False:",
        "test_yaml_text.py::test_what_is_refused",
    ),
    "signed lines of a journal": (
        "checkpoints/journal_text.py",
        "if not all(_is_ours(line, files, names) for line in lines):",
        "if False:",
        "fuzz/test_fuzz.py::test_the_corpus",
    ),
    "messages": (
        "errors.py",
        "super().__init__(visible(message))",
        "super().__init__(message)",
        "test_text.py::test_every_error_of_ours_has_a_message_that_can_be_shown",
    ),
    "names on standard output": (
        "commands/merge.py",
        "plan_text(all_visible(summary))",
        "plan_text(summary)",
        "test_hostile.py::test_names_do_not_drive_the_terminal",
    ),
    "links in a card": (
        "hub/card.py",
        r're.sub(r"[\[\]]", r"\\\g<0>", _bare(text))',
        "_bare(text)",
        "hub/test_card.py::test_a_name_can_be_no_link_picture_or_hidden_character",
    ),
    "fence of a recipe in a card": (
        "hub/card.py",
        'fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))',
        'fence = "```"',
        "hub/test_card.py::test_a_long_name_cannot_end_the_recipe",
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutated")
    for name in ("streammerge", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "out"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run_test(folder: Path, test: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", f"tests/{test}"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.full
@pytest.mark.parametrize(("module", "guard", "instead", "test"), MUTATIONS.values(), ids=MUTATIONS)
def test_without_its_guard_the_test_fails(copy: Path, module: str, guard: str, instead: str, test: str) -> None:
    path = copy / "streammerge" / module
    source = path.read_text()
    path.write_text(source.replace(guard, instead))
    try:
        found = run_test(copy, test)
    finally:
        path.write_text(source)
    assert found.returncode == 1 and re.search(r"^FAILED ", found.stdout, re.MULTILINE), found.stdout[-3000:]


@pytest.mark.full
def test_with_all_guards_every_one_of_them_passes(copy: Path) -> None:
    for test in sorted({test for *_, test in MUTATIONS.values()}):
        found = run_test(copy, test)
        assert found.returncode == 0, found.stdout[-3000:]


def test_every_guard_is_there_once() -> None:
    for module, guard, _, test in MUTATIONS.values():
        assert (ROOT / "streammerge" / module).read_text().count(guard) == 1, guard
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / path).read_text(), test
