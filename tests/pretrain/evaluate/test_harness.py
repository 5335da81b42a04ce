"""lm-evaluation-harness over local task files, against the whole document's forward."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from pretrain import trained
from pretrain.convert import export
from pretrain.evaluate import harness
from pretrain.evaluate.harness import Streamed
from pretrain.evaluate.questions import EvaluationError, ResultError
from pretrain.trained import Trained
from tests.data_prep.tokenizer.conftest import byte_level
from tests.pretrain import kinds

TEXT = "It is a truth universally acknowledged, that a single man in possession of a fortune"
QUESTIONS = [
    (TEXT * 3 + " ", "must be", "a wife"),
    ("However little", "known", "—"),
    (TEXT, "a", "such"),
]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task of each kind of request, as the harness's users write them."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "tasks"
    directory.mkdir()
    lines = [
        {"question": question, "first": first, "second": second, "answer": index % 2}
        for index, (question, first, second) in enumerate(QUESTIONS)
    ]
    data = directory / "questions.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = (
        f"dataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
    )
    kinds = {
        "choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{[first, second]}}'\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}]\n",
        "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{question}}'\nmetric_list: [{metric: bits_per_byte}]\n",
        "continue": "output_type: generate_until\ndoc_to_text: '{{question}}'\n"
        "doc_to_target: '{{first}}'\ngeneration_kwargs: {until: [e], max_gen_toks: 9}\n"
        "metric_list: [{metric: exact_match}]\n",
    }
    for name, text in kinds.items():
        (directory / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    return directory


@torch.no_grad()
def log_p(model: Trained, tokens: list[int]) -> Tensor:
    """Log-probabilities [T, V] of the whole document's forward."""
    row = torch.tensor([tokens])
    starts = torch.zeros_like(row, dtype=torch.bool)
    logits = model.model(row, starts, model.model.initial_state(1, "cpu")).logits
    return logits[0].log_softmax(dim=1)


def likelihood(model: Trained, context: str, following: str) -> tuple[float, bool]:
    """Of `following` after BOS and `context`."""
    bos, encode = model.tokenizer.bos_id, model.tokenizer.encode
    assert bos is not None
    whole = [bos, *encode(context + following).tolist()]
    first = 1 + len(encode(context))
    scores = log_p(model, whole)
    picked = [float(scores[place - 1, whole[place]]) for place in range(first, len(whole))]
    likeliest = [int(scores[place - 1].argmax()) for place in range(first, len(whole))]
    return sum(picked), likeliest == whole[first:]


@pytest.mark.parametrize("context", ["x", TEXT, TEXT * 7])
@kinds.of_every_kind
def test_likelihoods_are_those_of_the_whole_document(
    tmp_path: Path, write_run: Any, kind: str, context: str
) -> None:
    write_run(tmp_path / "run", memory=kinds.memory(kind))
    model = trained.load(tmp_path / "run", torch.device("cpu"))
    streamed = Streamed(model)
    following = " must be in want of a wife"
    ((found, greedy),) = streamed.loglikelihood(
        [SimpleNamespace(args=(context, following))], disable_tqdm=True
    )
    expected, likeliest = likelihood(model, context, following)
    assert found == pytest.approx(expected, abs=1e-4)
    assert greedy is likeliest
    (rolled,) = streamed.loglikelihood_rolling([SimpleNamespace(args=(context + following,))])
    assert rolled == pytest.approx(likelihood(model, "", context + following)[0], rel=1e-5)


def test_whole_spans_of_a_context_cost_no_logits_but_one_each_window(model: Trained) -> None:
    ids, following, computed = model.tokenizer.encode(TEXT * 7).tolist(), [50, 60, 70], list[int]()
    expected = log_p(model, [*ids, *following])[len(ids) - 1 : -1].gather(
        1, torch.tensor(following)[:, None]
    )
    hook = model.model.lm_head.register_forward_pre_hook(
        lambda _, given: computed.append(given[0].shape[-2])
    )
    found, _ = Streamed(model)._score(ids, following)
    hook.remove()
    assert found == pytest.approx(float(expected.sum()), abs=1e-4)
    assert sum(computed) <= len(ids) // 64 + 2 + 16 + len(following) < len(ids) / 5


def test_a_text_without_tokens_is_certain(model: Trained) -> None:
    streamed = Streamed(model)
    assert streamed.loglikelihood_rolling([SimpleNamespace(args=("",))]) == [0.0]
    requests = [SimpleNamespace(args=(TEXT, ""))]
    assert streamed.loglikelihood(requests, disable_tqdm=True) == [(0.0, True)]


@pytest.fixture
def without_bos(tmp_path: Path, write_run: Any) -> Trained:
    """A model with a tokenizer as GPT-2's, which lays no BOS."""
    file = byte_level(tmp_path / "tokenizer.json", None, ("<|endoftext|>",))
    write_run(tmp_path / "run", tokenizer=file)
    return trained.load(tmp_path / "run", torch.device("cpu"))


def test_a_token_that_reaches_from_the_context_to_the_end_is_the_continuations(
    without_bos: Trained,
) -> None:
    encode = without_bos.tokenizer.encode
    (*before, context), (*_, joined) = encode("of the").tolist(), encode("of them").tolist()
    assert (*before, joined) == (*encode("of them").tolist(),) and joined != context
    requests = [SimpleNamespace(args=("of the", "m"))]
    ((found, greedy),) = Streamed(without_bos).loglikelihood(requests, disable_tqdm=True)
    scores = log_p(without_bos, before)[-1]
    assert found == pytest.approx(float(scores[joined]), abs=1e-5)
    assert greedy is bool(scores.argmax() == joined)


@pytest.mark.parametrize("following", ["of them", TEXT])
def test_without_a_bos_a_context_of_white_space_follows_eos(
    without_bos: Trained, following: str
) -> None:
    pairs = [(" \n", following), ("", f" \n{following}")]
    found, expected = Streamed(without_bos).loglikelihood(
        [SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True
    )
    ids = [without_bos.tokenizer.eos_id, *without_bos.tokenizer.encode(f" \n{following}")]
    assert found == expected
    picked = log_p(without_bos, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
    assert found[0] == pytest.approx(float(picked.sum()), rel=1e-5)


def test_the_likeliest_continuation_is_known_as_such(model: Trained) -> None:
    bos = model.tokenizer.bos_id
    assert bos is not None
    context = [bos, *model.tokenizer.encode(TEXT).tolist()]
    best = int(log_p(model, context)[-1].argmax())
    streamed = Streamed(model)
    assert streamed._score(context, [best])[1]
    assert not streamed._score(context, [(best + 1) % 320])[1]


def test_no_figure_is_made_of_logits_that_are_not_finite(model: Trained) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    streamed = Streamed(model)
    pair, whole, until = (TEXT * 2, " must be"), (TEXT * 2,), (TEXT, {"until": []})
    with pytest.raises(ResultError, match="logits are not finite"):
        streamed.loglikelihood([SimpleNamespace(args=pair)], disable_tqdm=True)
    with pytest.raises(ResultError, match="logits are not finite"):
        streamed.loglikelihood_rolling([SimpleNamespace(args=whole)])
    with pytest.raises(ResultError, match="logits are not finite"):
        streamed.generate_until([SimpleNamespace(args=until)])


def test_every_kind_of_task_runs_from_local_files(
    model: Trained, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert harness.run(tmp_path / "run", tasks, tasks=[], shots=None, limit=None) == 0
    said = capsys.readouterr().out
    written = json.loads((tmp_path / "run/harness-7.json").read_text())
    assert all(name in said for name in ("choice", "rolling", "continue", "harness-7.json"))
    right = 0
    for index, (question, first, second) in enumerate(QUESTIONS):
        # The harness moves a context's last space to what follows, and lays one before an answer.
        scores = [likelihood(model, question.rstrip(), f" {one}")[0] for one in (first, second)]
        right += int(scores.index(max(scores)) == index % 2)
    assert written["results"]["choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    nats = sum(likelihood(model, "", question)[0] for question, _, _ in QUESTIONS)
    size = sum(len(question.encode()) for question, _, _ in QUESTIONS)
    bits = written["results"]["rolling"]["bits_per_byte,none"]
    assert bits == pytest.approx(-nats / size / 0.6931471805599453, rel=1e-4)
    assert 0 <= written["results"]["continue"]["exact_match,none"] <= 1
    # Fewer tasks are another question: they replace nothing.
    assert harness.run(tmp_path / "run", tasks, tasks=["rolling"], shots=None, limit=1) == 0
    assert json.loads((tmp_path / "run/harness-7.json").read_text()) == written
    fewer = json.loads((tmp_path / "run/harness-7-2.json").read_text())
    assert (fewer["tasks"], fewer["limit"], list(fewer["results"])) == (["rolling"], 1, ["rolling"])


def test_a_continuation_ends_before_the_first_of_the_requests_ends(model: Trained) -> None:
    streamed = Streamed(model)

    def continued(**options: Any) -> str:
        (text,) = streamed.generate_until([SimpleNamespace(args=(TEXT, options))])
        return text

    whole = continued(until=[], max_gen_toks=40)
    end = whole[len(whole) // 2]
    assert whole and end in whole
    assert continued(until=[end, "never there"], max_gen_toks=40) == whole[: whole.index(end)]


def test_the_harness_s_own_model_of_an_export_gives_the_same_figures(
    model: Trained, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="lm-eval's models of transformers need accelerate")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export.run(model.run_directory, tmp_path / "hub", "stored")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", trust_remote_code=True)
    own = AutoTokenizer.from_pretrained(tmp_path / "hub", trust_remote_code=False)
    theirs, without = (
        HFLM(loaded.eval(), tokenizer=own, device="cpu", add_bos_token=laid)
        for laid in (None, False)
    )
    ours = Streamed(model)
    pairs = [("", TEXT), ("It is ", "a truth"), (TEXT, " must be"), (TEXT * 7, "\n"), ("\n", "a b")]
    scores = [
        one.loglikelihood(
            [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)],
            disable_tqdm=True,
        )
        for one in (ours, theirs)
    ]
    for (found, greedy), (expected, likeliest) in zip(*scores, strict=True):
        assert found == pytest.approx(expected, abs=1e-3)
        assert greedy is likeliest
    # Of whole texts lm-eval 0.4.13 scores a BOS of the tokenizer's after the one it lays itself.
    rolled = [Instance("loglikelihood_rolling", {}, (TEXT * 3,), 0)]
    (found,), (expected,), (twice,) = (
        one.loglikelihood_rolling(rolled, disable_tqdm=True) for one in (ours, without, theirs)
    )
    assert found == pytest.approx(expected, abs=1e-3)
    assert abs(twice - found) > 0.1


def test_samples_after_one_context_differ_and_do_not_depend_on_other_requests(
    model: Trained,
) -> None:
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    one, other = (SimpleNamespace(args=(context, options)) for context in (TEXT, "However little"))
    streamed = Streamed(model)
    samples = streamed.generate_until([one] * 4)
    assert len(set(samples)) == 4
    assert streamed.generate_until([other, one, one, other])[1:3] == samples[:2]


def test_the_tasks_of_a_group_are_evaluated_in_it_alone(
    model: Trained, tasks: Path, tmp_path: Path
) -> None:
    (tasks / "some.yaml").write_text("group: some\ntask: [choice, rolling]\n")
    (tasks / "more.yaml").write_text("group: more\ntask: [some]\n")
    assert harness.run(tmp_path / "run", tasks, tasks=[], shots=None, limit=1) == 0
    written = json.loads((tmp_path / "run/harness-7.json").read_text())
    assert written["tasks"] == ["continue", "more"]
    assert {"choice", "rolling", "continue"} <= written["results"].keys()


def test_a_task_that_is_not_there_is_refused_with_those_that_are(
    model: Trained, tasks: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        EvaluationError, match=r"no task chioce; it has \['choice', 'continue', 'ro"
    ):
        harness.run(tmp_path / "run", tasks, tasks=["chioce"], shots=None, limit=None)
    with pytest.raises(EvaluationError, match="no task file in it"):
        harness.run(tmp_path / "run", tmp_path / "run", tasks=[], shots=None, limit=None)


def test_tasks_of_another_directory_of_the_same_name_are_another_question(
    model: Trained, tasks: Path, tmp_path: Path
) -> None:
    def asked(directory: Path) -> None:
        assert harness.run(tmp_path / "run", directory, tasks=["rolling"], shots=None, limit=1) == 0

    asked(tasks)
    copied = Path(shutil.copytree(tasks, tmp_path / "elsewhere" / "tasks"))
    asked(copied)  # the same tasks: the same question
    assert [path.name for path in (tmp_path / "run").glob("harness*")] == ["harness-7.json"]
    with (copied / "rolling.yaml").open("a") as file:
        file.write("metadata: {version: 2}\n")
    asked(copied)
    assert len(list((tmp_path / "run").glob("harness*"))) == 2
    with (tasks / "questions.jsonl").open("a") as file:
        file.write(json.dumps({"question": "Or", "first": "a", "second": "b", "answer": 0}) + "\n")
    asked(copied)  # which reads them from there
    assert len(list((tmp_path / "run").glob("harness*"))) == 3


def test_the_files_of_a_tasks_questions_are_found_as_they_may_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("set/train/a.jsonl", "set/b.jsonl", "c.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()

    def found(**options: Any) -> list[str]:
        task = SimpleNamespace(get_config={"dataset_kwargs": options}.get)
        return sorted(map(str, harness._data_files(task)))

    both = {"test": ["c.jsonl", "set/b.jsonl"], "dev": "c.jsonl"}
    assert found(data_files=both) == ["c.jsonl", "c.jsonl", "set/b.jsonl"]
    assert found(data_files="*.jsonl") == ["c.jsonl"]
    assert found(data_files=f"{tmp_path}/set/**/*.jsonl") == [
        f"{tmp_path}/set/b.jsonl", f"{tmp_path}/set/train/a.jsonl"
    ]  # fmt: skip
    assert found(data_files="https://example.org/q.jsonl") == found() == []


def refusal(run: Path, tasks: Path, *names: str) -> str:
    """Why the tasks are refused, before a model is loaded."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    with pytest.raises(EvaluationError) as caught:
        harness.run(run, tasks, tasks=names, shots=None, limit=None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max_gen_toks: 9", "num_beams: 4",
         "generation_kwargs {num_beams: 4} cannot be followed; expected some of until, max_gen"),
        ("max_gen_toks: 9", "top_k: 5, min_p: 0.1", "{min_p: 0.1, top_k: 5}"),
        ("max_gen_toks: 9", "max_gen_toks: many", "invalid literal for int()"),
        ("until: [e]", "until: [5]", "until: expected texts, found [5]"),
        ("max_gen_toks: 9", "top_p: 7", "cannot be followed: "),
        ("max_gen_toks: 9", "do_sample: true, top_p: 0", "cannot be followed: "),
        ("task: continue", "task: continue\nno_such_key: 1", "no_such_key"),
        ("output_type: generate_until", "output_type: guess", "task continue cannot be run by the "
         "harness: ValueError: Got invalid output_type 'guess'"),
        ("questions.jsonl", "nothing.jsonl", "FileNotFoundError"),
        ("metric: exact_match", "metric: luck", "see what the harness printed before"),
    ],
)  # fmt: skip
def test_what_a_task_asks_and_we_or_the_harness_cannot_do_is_one_sentence_before_any_work(
    model: Trained, tasks: Path, tmp_path: Path, old: str, new: str, said: str
) -> None:
    path = tasks / "continue.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert said in (found := refusal(tmp_path / "run", tasks, "continue")), found
    assert found.startswith(f"{tasks}: ")


@pytest.mark.parametrize(
    ("name", "content", "more", "said"),
    [
        ("json", "", "", "{file} is empty"),
        ("json", "\n\n", "", "{file} is empty"),
        ("csv", "question,first\n", "", "its files hold no document"),
        ("json", '{"question": "x", "first": "y"}\n', "process_docs: !function own.none\n",
         "of its documents none is left to ask"),
    ],
)  # fmt: skip
def test_a_task_without_questions_is_refused_and_says_why(
    model: Trained, tasks: Path, tmp_path: Path, name: str, content: str, more: str, said: str
) -> None:
    path, file = tasks / "continue.yaml", tasks / f"none.{name}"
    file.write_text(content)
    (tasks / "own.py").write_text("def none(docs):\n    return docs.filter(lambda doc: False)\n")
    text = path.read_text().replace("dataset_path: json", f"dataset_path: {name}")
    path.write_text(text.replace(str(tasks / "questions.jsonl"), str(file)) + more)
    found = refusal(tmp_path / "run", tasks, "continue")
    assert found == f"{tasks}: task continue has no questions: {said.format(file=file)}"


def test_task_files_that_the_harness_would_leave_out_are_refused(
    model: Trained, tasks: Path, tmp_path: Path
) -> None:
    text = (tasks / "choice.yaml").read_text()
    (tasks / "common.yml").write_text("output_type: multiple_choice\n")  # for files that include it
    (tasks / "spaced.yaml").write_text(text.replace("task: choice", "task: a choice # named so"))
    (tasks / "more").mkdir()
    (tasks / "more" / "again.yaml").write_text(text)
    (tasks / "other.yml").write_text(text.replace("task: choice", "task: other"))
    (tasks / "typo.yaml").write_text(text.replace("task: choice", "task: 'typo'  # new") + "a: [\n")
    found = refusal(tmp_path / "run", tasks)
    assert found.removeprefix(f"{tasks}/").split(f"; {tasks}/") == [
        f"more/again.yaml: is not read by the harness, as {tasks}/choice.yaml is choice, too",
        "other.yml: is not read by the harness; call it other.yaml",
        "typo.yaml: is not YAML of a task or a group that the harness can read",
    ]


def test_nothing_is_asked_of_the_network(model: Trained, tasks: Path, tmp_path: Path) -> None:
    path = tasks / "choice.yaml"
    path.write_text(path.read_text().replace("dataset_path: json", "dataset_path: some/data"))
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    ended = subprocess.run(
        [sys.executable, "-m", "pretrain.cli", "eval", "harness", str(tmp_path / "run"),
         f"--tasks-directory={tasks}", "--tasks", "choice"],
        # A request would be one of this server, of which there is none.
        env={**environment, "HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert ended.returncode == 2 and "task choice cannot be run by the harness" in ended.stderr
    assert "127.0.0.1" not in ended.stderr and "OfflineMode" in ended.stderr, ended.stderr


def test_shots_that_a_task_would_not_take_are_refused(
    model: Trained, tasks: Path, tmp_path: Path
) -> None:
    with (tasks / "choice.yaml").open("a") as file:
        file.write("num_fewshot: 0\n")
    with pytest.raises(
        EvaluationError, match="choice: its file sets num_fewshot: 0, which --shots"
    ):
        harness.run(tmp_path / "run", tasks, tasks=["choice"], shots=2, limit=1)


def test_options_without_an_effect_are_taken(model: Trained, tasks: Path, tmp_path: Path) -> None:
    path = tasks / "continue.yaml"
    options = "num_beams: 1, repetition_penalty: 1.0, top_k: null, do_sample: false"
    path.write_text(path.read_text().replace("max_gen_toks: 9", f"max_new_tokens: 2, {options}"))
    assert harness.run(tmp_path / "run", tasks, tasks=["continue"], shots=None, limit=1) == 0


def test_a_field_that_the_documents_lack_is_one_sentence_and_names_its_task(
    model: Trained, tasks: Path, tmp_path: Path
) -> None:
    path = tasks / "rolling.yaml"
    path.write_text(path.read_text().replace("{{question}}", "{{nowhere}}"))
    with pytest.raises(EvaluationError) as caught:
        harness.run(tmp_path / "run", tasks, tasks=["rolling"], shots=None, limit=1)
    assert str(caught.value).startswith(
        f"{tasks}: task rolling cannot be run by the harness: UndefinedError: "
    )
    assert "'nowhere' is undefined" in str(caught.value)


def test_a_fault_of_ours_is_not_the_tasks(
    model: Trained, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Streamed, "_score", lambda self, *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        harness.run(tmp_path / "run", tasks, tasks=["rolling"], shots=None, limit=1)
