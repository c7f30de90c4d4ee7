"""Projects: the template, what the check misses and finds, the page, and folders of strangers."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import sample_reports
from typer.testing import CliRunner, Result

from pipelines import recipes
from pipelines.__main__ import app
from pipelines.course.project import page, rubric, template
from pipelines.infra import redact
from pipelines.infra.errors import LabError

TEXT = "These are more than eight words about the matter, written by a student."


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A project folder as `project new` writes it."""
    template.create(tmp_path / "my-idea", "tour")
    return tmp_path / "my-idea"


def fill(path: Path) -> None:
    """Replace every TODO of a file."""
    path.write_text(path.read_text("utf-8").replace("TODO", TEXT), "utf-8")


@pytest.fixture
def complete(begun: Path) -> Path:
    """A project that meets the rubric, with chosen transcripts instead of trained models."""
    runs, settings = begun / "runs", {"augment.noise_share": 0.5}
    (begun / "idea.toml").write_text((begun / "idea.toml").read_text() + "\n[augment]\nnoise_share = 0.5\n")
    reports = {}
    for seed in (42, 43):
        sample_reports.report(runs, "my-idea-baseline", sample_reports.wrong(4), seed=seed)
        reports["after"] = sample_reports.report(runs, "my-idea", sample_reports.wrong(2), seed=seed, settings=settings)
    reports["before"] = sample_reports.report(runs, "my-idea", sample_reports.wrong(9), tuned=False)
    for folder in (runs / "my-idea").glob("train-*"):
        (folder / "model").mkdir()
        shutil.copy(folder / "recipe.json", folder / "model" / "recipe.json")
        (folder / "model" / "README.md").write_text("card")
    (runs / "features" / "tour-1a2b").mkdir(parents=True)
    (runs / "features" / "tour-1a2b" / "README.md").write_text("card")
    stages = {"features": {"cache_uri": "elsewhere/tour-1a2b"}, "training": {"seconds": 90}, "scores": {"seconds": 5}}
    # paths of the student's machine
    stages["scores"] |= {name: f"elsewhere/{report.folder.name}" for name, report in reports.items()}
    (runs / "my-idea" / "stages.json").write_text(json.dumps(stages))
    fill(begun / "plan.md")
    fill(begun / "README.md")
    readme = (begun / "README.md").read_text()
    clips = "\n".join(f"- `s00-{n}`: {TEXT}" for n in range(5))
    readme = re.sub(r"- `clip-0001`.*", clips, readme)
    (begun / "README.md").write_text(
        readme.replace("## Demo\n", "## Demo\n\nhttps://huggingface.co/spaces/me/my-idea\n")
    )
    return begun


def call(*arguments: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


def missing(folder: Path) -> dict[str, str]:
    """Return what the check misses, by key of the rubric."""
    return {line.key: line.missing for line in rubric.check(folder)[1] if line.missing}


def test_template_recipes_load_and_only_differ_by_name(begun: Path):
    idea, baseline = (recipes.load(str(begun / name)) for name in ("idea.toml", "baseline.toml"))
    assert (idea.name, baseline.name) == ("my-idea", "my-idea-baseline")
    assert idea.settings() | {"name": ""} == recipes.load("tour").settings() | {"name": ""}


@pytest.mark.parametrize("name", ["My idea", "x", "idé", "-a", "a" * 41, "=cmd"])
def test_odd_project_name_is_refused(tmp_path: Path, name: str):
    with pytest.raises(LabError, match="a project is named with"):
        template.create(tmp_path / name, "tour")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("My idea", (), "a project is named with"),
        ("my-idea", ("--base", "mine.toml"), "--base takes a recipe of the lab"),
        ("my-idea", ("--set", "augment.noise=1"), "unknown setting 'augment.noise'"),
        ("my-idea", ("--set", "augment.noise_share=2"), "augment.noise_share"),
    ],
)
@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_project_that_cannot_begin_writes_nothing(tmp_path: Path, name: str, options, words: str, dry_run):
    with pytest.raises(LabError, match=words):
        call("project", "new", tmp_path / name, *options, *dry_run)
    assert not list(tmp_path.iterdir())


def test_example_in_the_recipe_is_valid_without_its_hash(begun: Path):
    (begun / "idea.toml").write_text((begun / "idea.toml").read_text().replace("# augment", "augment"))
    assert rubric.Project(begun).changes == {"augment.noise_share": (0.0, 0.5)}


def test_change_of_the_command_is_in_the_recipe(tmp_path: Path):
    call("project", "new", tmp_path / "my-idea", "--set", "augment.noise_share=0.2", "--set", "language=da")
    assert rubric.Project(tmp_path / "my-idea").changes == {
        "language": ("sv", "da"),
        "augment.noise_share": (0.0, 0.2),
    }


def test_existing_files_are_not_overwritten(begun: Path):
    with pytest.raises(LabError, match="is not empty"):
        template.create(begun, "tour")


def test_unknown_base_recipe_writes_nothing(tmp_path: Path):
    with pytest.raises(LabError):
        template.create(tmp_path / "my-idea", "tuor")
    assert not list(tmp_path.iterdir())


def test_new_project_misses_every_line(begun: Path):
    assert missing(begun).keys() == rubric.RULES.keys()


def test_complete_project_misses_nothing(complete: Path):
    assert missing(complete) == {}


@pytest.mark.parametrize(
    ("file", "old", "new", "key", "words"),
    [
        ("plan.md", "## Hypothesis", "## Idea", "plan", "needs the section '## Hypothesis'"),
        ("README.md", "## Result\n\n", "## Result\n\nshort\n\n## Other\n\n", "comparison", "at least 8 words"),
        ("README.md", "| licence | " + TEXT, "| licence | TODO", "data", "replace TODO"),
        ("README.md", "`s00-3`", "`s99-9`", "errors", "no clip of the test set"),
        ("README.md", f"- `s00-4`: {TEXT}", "", "errors", "discusses 4 clips"),
        ("README.md", f"- `s00-4`: {TEXT}", "- `s00-4`: noise", "errors", "at least 8 words"),
        ("README.md", "https://huggingface", "at huggingface", "demo", "https address"),
        ("README.md", "https://huggingface", "../../etc/demo.mp4 ", "demo", "https address"),
        ("idea.toml", "noise_share = 0.5", "noise_share = 0.4", "reproducible", "another augment.noise_share"),
        ("idea.toml", "noise_share = 0.5", "noise_share = 0.0", "change", "equals baseline.toml"),
        ("idea.toml", "\n[augment]", '\n[curation]\nleaks = "ignore"\n\n[augment]', "data", "keeps test speakers"),
        ("idea.toml", "\n[augment]", "\n[argument]", "change", "argument"),
    ],
)
def test_what_is_missing_is_named(complete: Path, file: str, old: str, new: str, key: str, words: str):
    text = (complete / file).read_text("utf-8")
    assert old in text
    (complete / file).write_text(text.replace(old, new), "utf-8")
    assert words in missing(complete)[key]


def test_model_of_own_recordings_is_reproducible(complete: Path, tmp_path: Path):
    (complete / "baseline.toml").write_text(
        f'extends = "own"\nname = "my-idea-baseline"\n\n[source]\npath = "{tmp_path / "recordings"}"\n'
    )
    derived = {"training.steps": 120, "training.warmup_steps": 12, "training.eval_every": 12, "training.patience": 3}
    idea = recipes.load(str(complete / "idea.toml"), {**derived, "evaluation.max_new_tokens": 60})
    assert "reproducible" in missing(complete)
    for folder in (complete / "runs" / "my-idea").glob("train-*/model"):  # as training writes it
        (folder / "recipe.json").write_text(json.dumps(redact.redact_settings(idea.model_dump(mode="json"))))
    assert "reproducible" not in missing(complete)
    (complete / "idea.toml").write_text((complete / "idea.toml").read_text().replace("0.5", "0.4"))
    assert "another augment.noise_share" in missing(complete)["reproducible"]


def test_data_card_is_asked_for_unless_the_cache_is_remote(complete: Path):
    (complete / "runs" / "features" / "tour-1a2b" / "README.md").unlink()
    assert "no data card" in missing(complete)["data"]
    path = complete / "runs" / "my-idea" / "stages.json"
    path.write_text(path.read_text().replace("elsewhere/tour-1a2b", "hub://me/cache@c1"))
    assert missing(complete) == {}


def test_one_seed_is_not_enough(complete: Path):
    for manifest in (complete / "runs" / "my-idea" / "reports").glob("*/manifest.json"):
        if '"seed": 43' in manifest.read_text():
            shutil.rmtree(manifest.parent)
    assert "has 1 seed(s), expected 2" in missing(complete)["comparison"]


def test_recording_in_the_folder_is_a_demo(complete: Path):
    text = (complete / "README.md").read_text()
    (complete / "README.md").write_text(re.sub(r"https://huggingface\S*", "see demo.mp4", text))
    assert "demo" in missing(complete)
    (complete / "demo.mp4").write_bytes(b"0")
    assert "demo" not in missing(complete)


def test_page_shows_figures_and_escapes_texts(complete: Path):
    text = (complete / "README.md").read_text()
    hostile = '<script>alert(1)</script> [x](javascript:alert(1)) <img src=x onerror="alert(1)">'
    (complete / "README.md").write_text(text.replace("## Idea\n", f"## Idea\n\n{hostile}\n"))
    html = page.write(*rubric.check(complete)).read_text("utf-8")
    assert "<script" not in html
    assert 'href="javascript' not in html
    assert "<img src=x" not in html
    assert "11 of 11 lines of the rubric are met" in html
    assert "my-idea-baseline" in html
    assert "data:image/png;base64," in html
    assert html.count("<article>") == 5
    assert "Content-Security-Policy" in html


def test_page_shows_the_verdict_and_every_section(complete: Path):
    (complete / "plan.md").write_text((complete / "plan.md").read_text().replace("## Data\n", "## Data\n\nPLANNED\n"))
    with (complete / "README.md").open("a") as file:
        file.write("\n## Future work\n\nMORE VOICES\n")
    html = page.write(*rubric.check(complete)).read_text("utf-8")
    verdict = rubric.Project(complete).comparison.findings[1].verdict
    assert f"<strong>Verdict: {verdict}</strong>" in html
    assert "<code>augment.noise_share</code> from <code>0.0</code> to <code>0.5</code>" in html
    assert "PLANNED" in html  # the README has a section Data, too
    assert "MORE VOICES" in html


def test_discussed_clip_has_the_transcripts_of_three_models(complete: Path):
    html = page.write(*rubric.check(complete)).read_text("utf-8")
    first = re.search(r"<article>.*?</article>", html, re.DOTALL)[0]
    shown = re.findall(r"<th>(.*?)</th><td>(.*?)</td>", first)
    assert [label for label, _ in shown] == ["reference", "before tuning", "baseline", "idea"]
    assert [cell.count("<mark") for _, cell in shown] == [0, 9, 4, 2]
    assert "<li><code>s00-0" not in html  # only once, and not as a list


def test_page_embeds_small_pictures_of_the_demo(complete: Path):
    text = (complete / "README.md").read_text().replace("## Demo\n", "## Demo\n\nSee demo.png and big.png.\n")
    (complete / "README.md").write_text(text)
    (complete / "demo.png").write_bytes(b"picture")
    (complete / "big.png").write_bytes(b"0" * (page._MAX_PICTURE_BYTES + 1))
    html = page.write(*rubric.check(complete)).read_text("utf-8")
    assert 'src="data:image/png;base64,cGljdHVyZQ==" alt="demo.png"' in html
    assert 'alt="big.png"' not in html


def test_training_comes_before_the_texts(begun: Path):
    fill(begun / "plan.md")
    (begun / "idea.toml").write_text((begun / "idea.toml").read_text().replace("# augment", "augment"))
    _, lines = rubric.check(begun)
    assert rubric.next_step(lines) == f"no trained model of idea.toml: python -m pipelines project train {begun}"


def test_page_embeds_no_recordings_from_elsewhere(complete: Path, tmp_path: Path):
    project = rubric.Project(complete)
    assert page._may_embed(project)
    for path, allowed in ((str(tmp_path), False), (str(complete / "recordings"), True), ("/", False)):
        source = project.idea.source.model_copy(update={"kind": "folder", "path": path})
        project.__dict__["idea"] = project.idea.model_copy(update={"source": source})
        assert page._may_embed(project) is allowed


def test_folder_without_recipe_is_refused(tmp_path: Path):
    with pytest.raises(LabError, match="project new"):
        rubric.check(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"## \n## \n", b"#" * 300_000, b""])
def test_odd_readme_is_checked_all_the_same(complete: Path, content: bytes):
    (complete / "README.md").write_bytes(content)
    assert "data" in missing(complete)
    page.write(*rubric.check(complete))


def test_class_table_has_a_row_per_project(complete: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    template.create(tmp_path / "new-one", "tour")
    done = call(
        "project", "check", complete, tmp_path / "empty", tmp_path / "new-one", "--table", tmp_path / "class.csv"
    )
    assert done.exit_code == 0
    rows = list(csv.DictReader((tmp_path / "class.csv").open()))
    assert [row["met"] for row in rows] == ["11", "0", "0"]
    assert f"{tmp_path / 'new-one'}: 0 of 11 lines of the rubric are met; missing: plan, change, data" in done.output
    assert rows[0]["plan"] == "met"
    assert (rows[0]["wer_before"], rows[0]["wer_baseline"], rows[0]["wer_idea"]) == ("0.750", "0.333", "0.167")
    assert (rows[0]["settings"], rows[0]["delta_wer"], rows[0]["verdict"]) == (
        "augment.noise_share",
        "-0.167",
        "better",
    )
    assert "a project folder holds idea.toml" in rows[1]["error"]


def test_commands_begin_and_check_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page, "BROWSERS", ())
    assert json.loads(call("project", "new", tmp_path / "my-idea", "--dry-run", "--json").output)["dry_run"]
    assert not (tmp_path / "my-idea").exists()
    done = call("project", "new", tmp_path / "my-idea")
    assert done.output.splitlines()[-1].startswith("Next: fill in ")
    done = call("project", "check", tmp_path / "my-idea")
    assert "0 of 11 lines of the rubric are met" in done.output
    assert done.output.splitlines()[-1] == "Next: plan.md, section Hypothesis: replace TODO"
    with pytest.raises(LabError):
        call("project", "check", tmp_path / "none")


def test_packed_project_is_checked_like_the_folder(complete: Path, tmp_path: Path):
    model = next((complete / "runs" / "my-idea").glob("train-*/model"))
    for name in ("model.safetensors", "../checkpoints/checkpoint-9/trainer_state.json"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(b"0" * 9)
    (complete / "runs" / "features" / "tour-1a2b" / "shard-00000.bin").write_bytes(b"0" * 9)
    (complete / "demo.mp4").write_bytes(b"0")
    assert call("project", "pack", complete, "--dry-run").output.startswith("would pack ")
    done = call("project", "pack", complete)
    assert done.output.splitlines()[-1].startswith("Next: hand it in")
    with zipfile.ZipFile(tmp_path / "my-idea.zip") as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "teacher")
    assert "my-idea/demo.mp4" in names
    assert not [name for name in names if "checkpoint" in name or name.endswith((".safetensors", ".bin"))]
    assert missing(tmp_path / "teacher" / "my-idea") == {}
    with pytest.raises(LabError, match="exists"):
        call("project", "pack", complete)


def test_heading_in_a_block_of_code_begins_no_section():
    found = rubric.sections("## Idea ##\n```bash\n## Data\n```\n```one line```\n## Result\nworse\n~~~\n## Cost")
    assert found == {"idea": "```bash\n## Data\n```\n```one line```", "result": "worse\n~~~\n## Cost"}


def test_long_words_are_checked_in_linear_time(complete: Path):
    text = (complete / "README.md").read_text().replace("## Demo\n", "## Demo\n\n" + "a" * 190_000 + ".mp4\n")
    (complete / "README.md").write_text(text)
    rubric._demo(rubric.Project(complete))  # took minutes with a regular expression


@pytest.mark.parametrize(
    "stages",
    [
        {"scores": [1]},
        {"scores": None},
        {"training": None},
        {"scores": {"after": "a" * 5_000}},
        {"scores": {"after": 5}},
    ],
)
def test_odd_records_of_stages_are_missing(complete: Path, stages: dict):
    (complete / "runs" / "my-idea" / "stages.json").write_text(json.dumps(stages))
    assert {"before_after", "cost"} <= missing(complete).keys()


@pytest.mark.parametrize("name", ["project.html", "project.pdf", "runs/my-idea/reports/more"])
def test_link_out_of_the_folder_is_refused(begun: Path, tmp_path: Path, name: str):
    (tmp_path / "teachers.txt").write_text("grades")
    (begun / name).parent.mkdir(parents=True, exist_ok=True)
    (begun / name).symlink_to(tmp_path / "teachers.txt")
    with pytest.raises(LabError, match="a link to a place outside the project"):
        rubric.check(begun)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipe_is_refused(begun: Path):
    os.mkfifo(begun / "pipe")
    with pytest.raises(LabError, match="neither a file nor a folder"):
        rubric.check(begun)


def test_page_that_cannot_be_written_is_one_line(begun: Path):
    (begun / template.PAGE).mkdir()
    with pytest.raises(LabError, match="cannot be written"):
        page.write(*rubric.check(begun))
