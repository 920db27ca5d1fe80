"""The run as a model of lm-evaluation-harness: what it answers, and tasks from files where the package is installed."""

import importlib.util
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import diffrwkv
from diffrwkv import choosing, lm_eval, scoring
from diffrwkv.config import UserError
from tests.known_run import exact, ids, make, real

INSTALLED = importlib.util.find_spec("lm_eval") is not None


def requests(*args, task="task", same=False):
    return [SimpleNamespace(args=a, task_name=task, doc_id=0 if same else i) for i, a in enumerate(args)]


def test_likelihoods_are_those_of_the_chain_rule():
    model = lm_eval.Answers(make("autoregressive"))
    found = model.loglikelihood(requests(("ab", "ba"), ("", "abb"), ("a", "b")))
    expected = [-exact(ids("abba"), 2), -exact(ids("abb")), -exact(ids("ab"), 1)]
    np.testing.assert_allclose([x for x, _ in found], expected, rtol=1e-5)
    assert {type(greedy) for _, greedy in found} == {bool}
    rolling = model.loglikelihood_rolling(requests(("abba",), ("",), ("bab",)))
    np.testing.assert_allclose(rolling, [-exact(ids("abba")), 0, -exact(ids("bab"))], rtol=1e-5)


def test_blanks_move_to_the_continuation():
    model = lm_eval.Answers(real("attention"), draws=8)
    [(nats, _)] = model.loglikelihood(requests(("Say: \n", "no")))
    [a] = choosing.answers(model.run, [scoring.Item("Say:", " \nno", "", "")], draws=8)
    assert nats == pytest.approx(-a.nats, rel=1e-5)


def test_what_is_filled_in_is_unknown_under_other_noise():
    model = lm_eval.Answers(make("udlm"), draws=2)
    assert [g for _, g in model.loglikelihood(requests(("a", "b"), ("a", "a"), same=True))] == [None, None]
    with pytest.raises(UserError, match="The task 'lambada' asks what the model fills in"):
        model.loglikelihood(requests(("a", "b"), ("a", "a"), task="lambada"))
    with pytest.raises(UserError, match="'flm' bounds no likelihood"):
        lm_eval.Answers(make("flm"))
    with pytest.raises(UserError, match="draws must be even"):
        lm_eval.Answers(make(), draws=3)


def test_texts_are_generated_up_to_what_ends_them(monkeypatch):
    """Contexts of many lengths in their order, each with its own options."""
    r = real("attention")
    greedy = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    contexts = ["Say", "", "a longer one, of more than thirty-two bytes", "Say"]
    asked = requests(*[(c, dict(greedy)) for c in contexts[:3]], (contexts[3], {"max_gen_toks": 3, "temperature": 0.0}))
    model = lm_eval.Answers(r, batch_size=2)
    whole = diffrwkv.generate(
        r, "Say", max_new_tokens=6, sampler="confidence", num_steps=6, temperature=0.0, stop_at_eos=True
    ).texts[0][3:]
    found = model.generate_until(asked)
    assert len(found) == 4 and found[0] == whole.partition("\n")[0]
    cut = next(i for i in range(1, 6) if whole[:i] != whole[:1] or i == 5)
    again = model.generate_until(requests((contexts[0], greedy | {"until": ["\n", whole[1:cut]]})))
    assert whole[1:cut] not in again[0] and whole.startswith(again[0])
    drawn = requests(("Say", {"max_gen_toks": 4, "do_sample": True, "temperature": 0.7}))
    assert model.generate_until(drawn) == model.generate_until(drawn)  # the seed is the run's
    monkeypatch.setattr(lm_eval, "filled", lambda *a, **k: pytest.fail("computed"))
    with pytest.raises(UserError, match="--length = 4 is too small for 6 new tokens"):
        lm_eval.Answers(r, length=4).generate_until(asked[:1])
    with pytest.raises(UserError, match="asks for 0 new tokens"):
        model.generate_until(requests(("a", {"max_gen_toks": 0})))


def test_without_the_package_one_sentence_names_the_extra(monkeypatch, trained):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'diffrwkv\[lm-eval\]'"):
        lm_eval.main([f"--workdir={trained}", "--tasks=piqa"])
    for flags, told in [
        (["--tasks=piqa", "--limit=0"], "--limit must be at least 1"),
        (["--tasks=piqa", "--num_fewshot=-1"], "--num_fewshot must be at least 0"),
        (["--tasks=piqa", "--include_path=nowhere"], "nowhere is no folder"),
        ([], "required: --tasks"),
    ]:
        with pytest.raises(UserError, match=told):
            lm_eval.main([f"--workdir={trained}", *flags])


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
{rest}
metadata: {{version: 0}}
"""

TASKS = {
    "tiny_choices": """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_words": """
output_type: loglikelihood
doc_to_text: "{{query}}"
doc_to_target: " {{choices[0]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{query}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "tiny_generation": """
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: " {{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="lm-evaluation-harness is not installed: the extra lm-eval")
@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
def test_the_harness_runs_tasks_of_files(trained, tmp_path, capsys, monkeypatch):
    """Its numbers are those of `choose` and `score` on the same questions."""
    for name, folder in (("HF_HOME", "hf"), ("HF_DATASETS_CACHE", "hf/datasets")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    asked = [
        {"query": "the cat", "choices": ["sat", "ran off"], "gold": 0},
        {"query": "a dog", "choices": ["barks", "me"], "gold": 1},
        {"query": "a mat is", "choices": ["flat", "hot and wet"], "gold": 0},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in asked))
    (tmp_path / "tasks").mkdir()
    for name, rest in TASKS.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, data=data, rest=rest))
    lm_eval.main(
        [f"--workdir={run}", f"--tasks={','.join(TASKS)}", f"--include_path={tmp_path / 'tasks'}", "--batch_size=8"]
    )
    told = capsys.readouterr()
    found = json.loads(told.out.splitlines()[-1])["results"]
    assert "|tiny_choices" in told.out
    loaded = diffrwkv.load(run)
    own = choosing.choose(loaded, asked, batch_size=8)
    assert found["tiny_choices"]["acc"] == pytest.approx(np.mean([c.picked == c.gold for c in own]))
    assert found["tiny_choices"]["acc_norm"] == pytest.approx(np.mean([c.picked_norm == c.gold for c in own]))
    words = [scoring.Item(q["query"], " " + q["choices"][0], "", "") for q in asked]
    answers = choosing.answers(loaded, words, greedy=True, batch_size=8)
    assert found["tiny_words"]["acc"] == pytest.approx(np.mean([a.greedy for a in answers]))
    drawn = np.hypot.reduce([a.error for a in answers]) / 3
    ratio = np.log(found["tiny_words"]["perplexity"]) - np.mean([a.nats for a in answers])
    assert abs(ratio) <= 4 * np.sqrt(2) * drawn + 1e-5  # other masks: what is drawn depends on the place among all
    scores = diffrwkv.score(loaded, [q["query"] for q in asked], draws=128, batch_size=8)
    nats, size = sum(s.nats for s in scores), sum(len(q["query"]) for q in asked)
    assert found["tiny_rolling"]["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-4)
    assert 0 <= found["tiny_generation"]["exact_match"] <= 1
    [kept] = (run / "evaluations").glob("lm_eval-*.json")
    assert json.loads(kept.read_text())["results"] == found
    with pytest.raises(UserError, match="No task is called 'nothing'"):
        lm_eval.main([f"--workdir={run}", "--tasks=nothing", f"--include_path={tmp_path / 'tasks'}"])
