"""The twelve promises of a push, each with the tests that break it and see it held."""

import ast
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROMISES: dict[int, tuple[str, tuple[str, ...]]] = {
    1: (
        "weights are safetensors or GGUF, names are on a list, no file is a pickle",
        (
            "test_preflight::test_1_names_are_on_a_list",
            "test_preflight::test_1_pickles_and_archives_are_known_by_their_first_bytes",
            "test_preflight::test_1_a_picture_with_an_archive_at_its_end",
            "test_hub_hostile::test_hostile_folders_are_refused",
            "test_hub_hostile::test_each_kind_is_refused_for_itself_and_not_for_its_sums",
        ),
    ),
    2: (
        "no links, devices, hidden files, names that two systems read differently",
        (
            "test_preflight::test_2_links_and_devices",
            "test_preflight::test_2_a_folder_that_is_a_link",
            "test_preflight::test_2_hidden_files",
            "test_preflight::test_2_names_that_two_systems_read_differently",
        ),
    ),
    3: (
        "index and files agree to the last tensor and byte",
        ("test_preflight::test_3_the_index_and_the_files_agree",),
    ),
    4: (
        "headers are strict",
        (
            "test_preflight::test_4_headers_are_strict",
            "test_preflight::test_4_length_and_size_of_a_header",
        ),
    ),
    5: (
        "no NaN or infinity came in, and untouched tensors are the base's, bit by bit",
        (
            "test_preflight::test_5_an_edited_tensor_is_finite",
            "test_push::test_untouched_tensors_are_compared_with_a_base_at_hand",
            "test_integrity::test_untouched_tensors_are_those_of_the_base",
        ),
    ),
    6: (
        "JSON has limits and no key twice; nothing is unpacked",
        (
            "test_preflight::test_6_json_is_strict",
            "test_preflight::test_6_texts_have_a_limit_and_are_texts",
        ),
    ),
    7: (
        "no secrets, home folders or names of machines",
        (
            "test_preflight::test_7_secrets_in_texts_and_in_metadata",
            "test_preflight::test_7_every_text_is_read",
            "test_preflight::test_7_home_folders",
            "test_preflight::test_7_the_name_of_this_machine",
        ),
    ),
    8: (
        "the token is in nothing that is written or said",
        (
            "test_push::test_the_token_is_in_nothing_that_is_written",
            "test_push::test_rights",
            "test_push::test_what_lasts_is_one_clear_line",  # its case "echo"
            "test_push_errors::test_no_failure_repeats_a_token",
        ),
    ),
    9: (
        "the token never reaches the storage",  # over every request of the file, at its end
        ("test_push::workers", "test_push_record::hub"),
    ),
    10: (
        "the base is at a commit, and its bytes are compared with the Hub's hashes before an edit",
        (
            "test_preflight::test_10_the_base_is_pinned",
            "test_integrity::test_the_edited_tensors_of_the_base_are_those_of_the_record",
            "test_hub_source::test_a_damaged_download_is_refused",
        ),
    ),
    11: (
        "code of a repository never runs",
        (
            "test_preflight::test_11_code_in_the_folder_is_never_run",
            "test_push::test_code_of_the_base_never_runs",
        ),
    ),
    12: (
        "a config that names code is reported",
        ("test_preflight::test_12_a_config_that_names_code_is_reported",),
    ),
}


@cache
def functions(module: str) -> frozenset[str]:
    tree = ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("number", range(1, 13))
def test_each_promise_has_tests_that_exist(number: int) -> None:
    _, tests = PROMISES[number]
    assert tests
    for test in tests:
        module, _, name = test.partition("::")
        assert name in functions(module), test
