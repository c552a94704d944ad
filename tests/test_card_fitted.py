"""The card of an approximate plan: what stands in for what, and what the calibration measured."""

from pathlib import Path
from typing import Any

import pytest
from cards import artifact, on_hub

from bake.artifact.frontmatter import card_metadata
from bake.cards.card import lint_card, render_card
from bake.errors import InputError

REASON = "stands in for affine 'mood' at resid_post.2"
CALIBRATION = {
    "stands_for": ["affine 'mood' at resid_post.2"],
    "kept": 0,
    "tokens": 4575,
    "held_out_tokens": 1471,
    "effect_kl": 0.18979,
    "kl": 0.0010251,
    "share": 0.0054014,
    "constant": True,
    "fits": [
        {"site": "mlp_out.2", "rank": 1, "ridge": 1e-05, "r2": 0.71679, "kl": 0.02799},
        {"site": "attn_out.3", "rank": 8, "ridge": 0.0001, "r2": 0.057066, "kl": 0.027356},
    ],
    "prompts": {
        "source": "eval.txt",
        "prompts": 64,
        "tokens": 7601,
        "digest": "sha256:" + "e" * 64,
    },
}


def stood_in(content: dict[str, Any]) -> None:
    """Make a record that of a plan with stand-ins."""
    on_hub(content)
    content["calibration"] = dict(CALIBRATION)
    content["plan"]["exactness"] = "approximate"
    content["plan"]["findings"] = [
        {
            "kind": kind,
            "concept": "mood",
            "sites": [site],
            "exactness": "approximate",
            "reason": REASON,
            "remedy": None,
        }
        for site in ("mlp_out.2", "attn_out.3")
        for kind in ("update", "offset")
    ]


def test_the_first_lines_say_what_was_asked_and_that_it_is_approximate(tmp_path: Path) -> None:
    out = artifact(tmp_path / "out", record=stood_in)
    text = render_card(out, repo="me/once")
    head = text.partition("\n# ")[2].partition("## Intended effect")[0]
    assert (
        "with *mood* set to a constant at `resid_post.2` (*s* = 1, *α* = 2), **approximately**."
        in head
    )
    assert "> **Approximate.** No stock weights compute this edit." in head
    assert "on 1,471 tokens that they were not fitted to they lose 0.54 % of its effect" in head
    assert "written into a weight" not in head  # what was folded is not what was asked
    assert "- an affine edit of *mood* at `resid_post.2`, approximately" in text
    assert lint_card(text, out) == ()


def test_what_the_calibration_measured_is_a_table(tmp_path: Path) -> None:
    text = render_card(artifact(tmp_path / "out", record=stood_in))
    section = text.partition("### Stand-ins")[2].partition("### Directions")[0]
    assert "| `mlp_out.2` | 1 | 1e-05 | 0.7168 | 0.02799 |" in section
    assert "| `attn_out.3` | 8 | 0.0001 | 0.05707 | 0.02736 |" in section
    for number in ("4,575", "1,471", "0.001025 nats", "0.1898 nats", "0.54 %", "`eval.txt`", "64"):
        assert number in section
    assert "| update | mood | `mlp_out.2, attn_out.3` | 2 | [fitted](#stand-ins) |" in text
    exact = render_card(artifact(tmp_path / "exact", record=on_hub))
    assert "Stand-ins" not in exact and "approximately" not in exact  # the control


def test_method_tag_and_paper_are_those_of_the_edit_that_was_asked(tmp_path: Path) -> None:
    text = render_card(artifact(tmp_path / "out", record=stood_in))
    assert card_metadata(text)["tags"][:3] == ["bake", "steering", "affine-concept-editing"]
    assert "model-editing" not in card_metadata(text)["tags"]
    assert "arXiv:2411.09003" in text and "arXiv:2202.05262" not in text


def test_a_kept_edit_beside_stand_ins_is_told_as_it_is(tmp_path: Path) -> None:
    def with_one_kept(content: dict[str, Any]) -> None:
        stood_in(content)
        content["calibration"]["kept"] = 1
        kept = {"kind": "offset", "concept": "mood", "sites": ["resid_post.1"]}
        kept |= {"exactness": "exact", "reason": "folded into a bias", "remedy": None}
        content["plan"]["findings"].insert(0, kept)

    text = render_card(artifact(tmp_path / "out", record=with_one_kept))
    assert "with *mood* added at 1 site, `resid_post.1`; *mood* set to a constant at" in text
    assert "| offset | mood | `mlp_out.2, attn_out.3` | 2 | [fitted](#stand-ins) |" in text
    assert "| offset | mood | `resid_post.1` | 1 | not recorded |" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"share": None}, "share is missing"),
        ({"tokens": "many"}, "tokens is no number"),
        ({"stands_for": ["a wish"]}, "which is no edit"),
        ({"fits": [1]}, "fits is no list of objects"),
    ],
)
def test_a_malformed_calibration_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    def spoiled(content: dict[str, Any]) -> None:
        stood_in(content)
        content["calibration"] |= change

    with pytest.raises(InputError) as refused:
        render_card(artifact(tmp_path / "out", record=spoiled))
    assert said in str(refused.value) and "calibration" in str(refused.value)
