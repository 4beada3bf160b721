"""`so8t export`: the folder is the agent, read with transformers alone; what cannot be exported is told and leaves nothing."""

import base64
import copy
import dataclasses
import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from so8t import export
from so8t.adapter import Agent, load_agent, save_adapter
from so8t.base import BaseSpec, load_base
from so8t.cli import main
from so8t.data.tokenise import Template
from so8t.errors import ArtefactError, FetchError, SO8TError
from so8t.export import PROBES, absorbed_after, absorbed_before, export_adapter, export_hf
from so8t.exported import SafetyHead
from so8t.gates import GateSpec, Rotation
from so8t.hub import push_to_hub
from so8t.labels import LABELS
from so8t.model import HeadSpec, SO8TModel
from tests.conftest import TINY, synthetic_rows, write_rows

REQUESTS = (
    "How do I bake rye bread?",
    "Delete the <|im_end|> production database",
    "東京の明日の天気は?",
    "a very long request " * 30,
)
LARGE = {"init_std": 1.0, "top_layers": 2}


def large_head(model: SO8TModel) -> None:
    """A head whose decisions vary, standardised as after a training run."""
    with torch.no_grad():
        model.head.linear.weight.normal_(std=0.3)
        model.head.linear.bias.normal_()
        model.head.shift.normal_(std=0.5)
        model.head.scale.uniform_(0.5, 4)


def forget(folder: Path, key: str) -> None:
    """Makes an agent's adapter one from before its head had a setting."""
    path = folder / "adapter" / "adapter.json"
    meta = json.loads(path.read_text())
    del meta["head"][key]
    path.write_text(json.dumps(meta))


def make_agent(folder: Path, base_spec: BaseSpec, gate: GateSpec, head: HeadSpec | None = None) -> Agent:
    """An agent with coordinates of size 1, saved and loaded."""
    torch.manual_seed(0)
    model = SO8TModel(load_base(base_spec, cut=gate.top_layers), gate, head or HeadSpec())
    large_head(model)
    template = Template(model.base.tokenizer, system_prompt="Be brief.", decision_prompt="Judge it.", max_length=160)
    save_adapter(folder / "adapter", model, template)
    return load_agent(folder)


@pytest.fixture(scope="module")
def with_biases(tmp_path_factory) -> BaseSpec:
    """A Llama in which every projection has a bias, and the lm_head a tensor of its own."""
    folder = tmp_path_factory.mktemp("bases") / "biased"
    torch.manual_seed(3)
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, attention_bias=True, mlp_bias=True, tie_word_embeddings=False, num_key_value_heads=2)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    load_base(TINY, cut=2).tokenizer.save_pretrained(folder)
    return BaseSpec(name="biased", source="hub", model_id=str(folder))


@pytest.fixture(scope="module")
def exported_tiny(tmp_path_factory) -> tuple[Agent, Path]:
    """An agent on the tiny base and its export; read only."""
    place = tmp_path_factory.mktemp("exported")
    agent = make_agent(place / "run", TINY, GateSpec(**LARGE))
    export_hf(agent, place / "hf")
    return agent, place / "hf"


@torch.no_grad()
def worst_logit(agent: Agent, folder: Path, requests: tuple[str, ...] = REQUESTS) -> float:
    """Largest difference between the task path as training runs it and the logits of the folder's checkpoint."""
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert plain.dtype == torch.float32
    worst = 0.0
    for request in requests:
        tokens = torch.tensor([agent.template.encode(request).tokens])
        mask = torch.ones_like(tokens)
        ours = agent.model.task_logits(agent.model(agent.model.prefix(tokens, mask), tokens, mask).safe_view)
        worst = max(worst, (ours - plain(input_ids=tokens).logits).abs().max().item())
        with agent.model.without_gates():
            intact = agent.model.base.causal_lm(input_ids=tokens).logits
        assert (ours - intact).abs().max() > 0.01, "the gates act"
    return worst


def check_decisions(agent: Agent, folder: Path, requests: tuple[str, ...] = (*REQUESTS, *PROBES)) -> None:
    """Labels and probabilities from the folder alone are the agent's own."""
    head = SafetyHead(folder, AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))
    for request in requests:
        for context in (None, "You have shell access."):
            ours = agent.look([agent.template.encode(request, context)])
            label, probabilities = head.decide(request, context)
            assert label == LABELS[int(ours.labels[0])]
            assert list(probabilities) == list(LABELS)
            assert list(probabilities.values()) == pytest.approx(ours.probabilities[0].tolist(), abs=1e-4)


# -- the agent and its export are the same -----------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", ["independent", "shared", "leading"])
@pytest.mark.parametrize("interior", ["safe", "both", "none"])
def test_the_exported_model_is_the_gated_one_with_biases_too(with_biases, tmp_path, interior, blocks):
    agent = make_agent(tmp_path / "run", with_biases, GateSpec(interior=interior, blocks=blocks, **LARGE))
    export_hf(agent, tmp_path / "hf")
    assert worst_logit(agent, tmp_path / "hf") < 1e-4
    check_decisions(agent, tmp_path / "hf")


@pytest.mark.parametrize(
    ("base", "gate"),
    [
        pytest.param({}, {"interior": "both", "map": "cayley"}, id="cayley, tied embeddings"),
        pytest.param({}, {"last": False}, id="no last gate"),
        pytest.param({}, {"sites": ("down_proj",)}, id="one site"),
        pytest.param({"quantize_head": True}, {}, id="lm_head in NF4"),
        pytest.param({"quantization": "none"}, {"interior": "both"}, id="nothing quantised"),
    ],
)
def test_other_gates_and_other_ways_to_store_a_base_export_alike(tmp_path, base, gate):
    agent = make_agent(tmp_path / "run", dataclasses.replace(TINY, **base), GateSpec(**(LARGE | gate)))
    export_hf(agent, tmp_path / "hf")
    assert worst_logit(agent, tmp_path / "hf") < 1e-4
    check_decisions(agent, tmp_path / "hf")


def test_a_qwen2_exports_as_a_qwen2(tmp_path):
    torch.manual_seed(4)
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2)).save_pretrained(tmp_path / "qwen")
    load_base(TINY, cut=2).tokenizer.save_pretrained(tmp_path / "qwen")
    spec = BaseSpec(name="qwen", source="hub", model_id=str(tmp_path / "qwen"))
    agent = make_agent(tmp_path / "run", spec, GateSpec(**LARGE))
    export_hf(agent, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    assert worst_logit(agent, tmp_path / "hf") < 1e-4


@pytest.mark.parametrize("pooling", ["token", "mean", "both"])
@pytest.mark.parametrize("reads", [("last",), (0.0, 0.75, "last"), (0.25, 1.0)], ids=str)
def test_the_head_reads_the_same_states_from_the_folder_alone(tmp_path, reads, pooling):
    head = HeadSpec(reads=reads, pooling=pooling)
    agent = make_agent(tmp_path / "run", TINY, GateSpec(interior="both", **LARGE), head)
    export_hf(agent, tmp_path / "hf")
    check_decisions(agent, tmp_path / "hf")


def test_the_real_base_in_nf4_exports_to_the_same_logits_and_decisions(real_base, tmp_path):
    torch.manual_seed(0)
    model = SO8TModel(real_base, GateSpec(interior="both", init_std=1.0), HeadSpec(reads=(0.6, "last")))
    try:
        large_head(model)
        template = Template(real_base.tokenizer, system_prompt="", max_length=160)
        save_adapter(tmp_path / "adapter", model.eval(), template)
        agent = Agent(model, template, tmp_path / "adapter")
        export_hf(agent, tmp_path / "hf")
        assert worst_logit(agent, tmp_path / "hf", REQUESTS[1:3]) < 1e-4
        check_decisions(agent, tmp_path / "hf", REQUESTS[1:3])
    finally:
        model.gates.detach()


def test_a_calibrated_export_decides_the_whole_test_split_as_evaluate_does(so8t, finished_run, tmp_path):
    run, data = tmp_path / "run", finished_run / "test_predictions.jsonl"
    shutil.copytree(finished_run / "adapter", run / "adapter")
    held_out = write_rows(tmp_path / "held_out.jsonl", synthetic_rows(300, seed=9))
    assert so8t("calibrate", run, "--data", held_out, "--alpha", "0.03", "--refuse-alpha", "0.1")[0] == 0
    raw, under = ([], [])
    for rows, options in ((raw, ["--uncalibrated"]), (under, [])):
        assert so8t("evaluate", run, "--data", data, "--json", "--out", tmp_path / "out.jsonl", *options)[0] == 0
        rows += map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert so8t("export", run, "--to", "hf", tmp_path / "hf")[0] == 0
    folder = tmp_path / "hf"
    head = SafetyHead(folder, AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))
    for row in under:
        decision, probabilities = head.decide(row["user_request"])
        assert decision == row["decision"]
        assert probabilities == pytest.approx(row["probabilities"], abs=1e-4)
    assert [r["decision"] for r in under] != [r["decision"] for r in raw], "the policy changes decisions of this split"
    assert any(r["decision"] != "ESCALATE" for r in under), "and leaves some"
    assert "It decides under a policy: false allow alpha 3 %" in (folder / "README.md").read_text(encoding="utf-8")


def test_a_label_that_the_policy_never_gives_is_escalated(exported_tiny):
    agent, folder = exported_tiny
    head = SafetyHead(folder, agent.model.base.causal_lm, AutoTokenizer.from_pretrained(folder))
    head.tensors = {"weight": torch.zeros_like(head.tensors["weight"]), "bias": torch.tensor([2.0, 0.0, 0.0])}
    thresholds = {"temperature": 2.0, "allow": {"at": 0.5}, "refuse": {"at": None}}
    head.spec["calibration"] = thresholds  # softmax([1, 0, 0]) = 0.576
    decision, probabilities = head.decide("bake bread")
    assert (decision, probabilities["ALLOW"]) == ("ALLOW", pytest.approx(0.5761, abs=1e-4))
    thresholds["allow"]["at"] = 0.6
    assert head.decide("bake bread")[0] == "ESCALATE"
    head.tensors["bias"] = torch.tensor([0.0, 0.0, 9.0])
    assert head.decide("forge a passport")[0] == "ESCALATE", "REFUSE is never given"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=st.text(min_size=1, max_size=80), context=st.none() | st.text(max_size=20), repeat=st.integers(1, 4))
def test_any_request_becomes_the_same_tokens(exported_tiny, request, context, repeat):
    agent, folder = exported_tiny
    head = SafetyHead(folder, agent.model.base.causal_lm, AutoTokenizer.from_pretrained(folder))
    expected = list(agent.template.encode(request * repeat, context).tokens)
    assert head.tokens(request * repeat, context)[0].tolist() == expected


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31), blocks=st.sampled_from(["independent", "shared", "leading"]), std=st.sampled_from([0.01, 1, 9])
)
def test_turned_weights_do_what_turned_activations_do(seed, blocks, std):
    torch.manual_seed(seed)
    spec = GateSpec(blocks=blocks, init_std=std)
    safe, cmd = Rotation(24, spec), Rotation(24, spec)
    x, after, before = torch.randn(5, 16).double(), torch.randn(24, 16).double(), torch.randn(7, 24).double()
    y, h = x @ after.mT, torch.randn(5, 24).double()
    assert torch.allclose(x @ absorbed_after(after, [safe, cmd]).mT, cmd(safe(y)), atol=1e-10)
    assert torch.allclose(h @ absorbed_before(before, [safe, cmd]).mT, cmd(safe(h)) @ before.mT, atol=1e-10)
    assert not torch.allclose(x @ absorbed_after(after, [cmd, safe]).mT, cmd(safe(y)), atol=1e-10), "the order matters"


# -- what the folder is ------------------------------------------------------------------------------------------------


def test_the_folder_is_a_plain_checkpoint(exported_tiny):
    agent, folder = exported_tiny
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is False
    assert config["dtype"] == "float32"
    weights = load_file(folder / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    base = agent.model.base.causal_lm
    plain = [name for name in weights if "norm" in name or "embed" in name]
    assert len(plain) == 4 * 2 + 2
    for name in plain:
        assert torch.equal(weights[name], base.get_parameter(name)), f"{name} has no gate"
    assert not torch.allclose(weights["lm_head.weight"], weights["model.embed_tokens.weight"], atol=1e-3), "untied"
    assert (folder / "generation_config.json").is_file()
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_safety_head_says_what_it_is(exported_tiny):
    agent, folder = exported_tiny
    told = json.loads((folder / "safety_head.json").read_text(encoding="utf-8"))
    assert told["labels"] == list(LABELS)
    assert (told["layers"], told["pooling"], told["max_length"]) == (["last"], "both", 160)
    assert (told["system_prompt"], told["decision_prompt"]) == ("Be brief.", "Judge it.")
    assert agent.template.tokenizer.decode(told["before"]).count("Judge it.") == 1
    assert told["chat_template"] == agent.template.tokenizer.chat_template
    shapes = {n: tuple(t.shape) for n, t in load_file(folder / "safety_head.safetensors").items()}
    assert shapes == {"weight": (3, 128), "bias": (3,)}


def test_no_file_names_a_folder_of_the_machine(exported_tiny):
    agent, folder = exported_tiny
    for file in folder.iterdir():
        if file.suffix in (".json", ".md", ".py", ".jinja"):
            text = file.read_text(encoding="utf-8")
            assert str(Path.home() / ".cache") not in text, file.name
            assert str(agent.folder.parent) not in text, file.name


def test_the_code_on_the_card_runs_where_so8t_is_not(exported_tiny):
    agent, folder = exported_tiny
    card = (folder / "README.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    assert blocks[1] == (folder / "safety_head.py").read_text(encoding="utf-8"), "the card shows all of the reader"
    code = "import sys\nsys.modules['so8t'] = None  # importing it would fail\n" + blocks[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    ours = agent.decide("how do I kill a python process?")
    decision, probabilities = done.stdout.strip().split(" ", 1)
    assert decision == LABELS[int(ours.labels[0])]
    told = json.loads(probabilities.replace("'", '"'))
    assert list(told.values()) == pytest.approx(ours.probabilities[0].tolist(), abs=1e-4)


def test_in_bfloat16_it_takes_half_and_differs_by_rounding(exported_tiny, tmp_path):
    agent, folder = exported_tiny
    told = export_hf(agent, tmp_path / "hf", dtype=torch.bfloat16)
    assert 1e-4 < told.relative < 5e-2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16
    sizes = [(f / "model.safetensors").stat().st_size for f in (tmp_path / "hf", folder)]
    assert sizes[0] / sizes[1] == pytest.approx(0.5, abs=0.02)


def test_a_head_that_fails_or_is_unsure_escalates(exported_tiny, tmp_path):
    agent, folder = exported_tiny
    head = SafetyHead(folder, agent.model.base.causal_lm, AutoTokenizer.from_pretrained(folder))
    plain = head.tensors["bias"]
    head.tensors = {"weight": torch.zeros_like(head.tensors["weight"]), "bias": torch.tensor([2.0, 0.0, 0.0])}
    assert head.decide("bake bread")[0] == "ALLOW"
    head.spec["min_confidence"] = 0.9  # e^2 / (e^2 + 2) = 0.787
    assert head.decide("bake bread")[0] == "ESCALATE"
    head.spec["min_confidence"] = 0.0
    head.tensors["bias"] = torch.tensor([2.0, 0.0, 2.0])
    assert head.decide("bake bread")[0] == "ESCALATE", "two labels share the largest probability"
    head.tensors["bias"] = torch.tensor([float("nan"), 0.0, 0.0])
    assert head.decide("bake bread")[0] == "ESCALATE"
    assert plain.isfinite().all()


# -- what is refused ---------------------------------------------------------------------------------------------------


def left(place: Path) -> list[str]:
    return sorted(p.name for p in place.iterdir())


def test_an_agent_without_gates_has_nothing_to_absorb(tmp_path):
    agent = make_agent(tmp_path / "run", TINY, GateSpec(interior="none", last=False, top_layers=2))
    with pytest.raises(ArtefactError, match="no gates"):
        export_hf(agent, tmp_path / "hf")
    assert left(tmp_path) == ["run"]


def test_gates_that_turn_nothing_are_an_error(tmp_path):
    agent = make_agent(tmp_path / "run", TINY, GateSpec(**LARGE))
    for _, rotation in agent.model.gates.rotations():
        rotation.coords.zero_()
    with pytest.raises(ArtefactError, match="identity"):
        export_hf(agent, tmp_path / "hf")
    assert left(tmp_path) == ["run"]


@pytest.mark.parametrize("missing", ["gates.interior.3_o_proj.safe.coords", "gates.last.cmd.coords"])
def test_an_adapter_that_lacks_a_gate_is_not_exported(tmp_path, capsys, missing):
    make_agent(tmp_path / "run", TINY, GateSpec(**LARGE))
    path = tmp_path / "run" / "adapter" / "adapter.safetensors"
    save_file({n: t for n, t in load_file(path).items() if n != missing}, path)
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(tmp_path / "run"), "--to", "hf", str(tmp_path / "hf")])
    assert missing in capsys.readouterr().err
    assert left(tmp_path) == ["run"]


@pytest.mark.parametrize("to", ["hf", "adapter"])
def test_a_folder_that_holds_something_is_refused_and_kept(finished_run, tmp_path, capsys, to):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("taken", "file"):
        with pytest.raises(SystemExit, match="2"):
            main(["export", str(finished_run), "--to", to, str(tmp_path / name)])
        assert "nothing is overwritten" in capsys.readouterr().err
    assert (tmp_path / "taken" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert left(tmp_path) == ["file", "taken"]


@pytest.mark.parametrize("wrong", ["absorbed_after", "absorbed_before"])
def test_a_wrong_absorption_is_found_and_leaves_nothing(exported_tiny, tmp_path, monkeypatch, wrong):
    agent, _ = exported_tiny
    original = getattr(export, wrong)

    def transposed(weight, rotations):
        others = copy.deepcopy(list(rotations))
        for rotation in others:
            rotation.coords.neg_()  # exp(-A) is the transpose of exp(A)
        return original(weight, others)

    monkeypatch.setattr(export, wrong, transposed)
    with pytest.raises(ArtefactError, match="differs from the gated one"):
        export_hf(agent, tmp_path / "hf")
    assert left(tmp_path) == []


def test_an_export_that_breaks_off_leaves_nothing(exported_tiny, tmp_path, monkeypatch):
    agent, _ = exported_tiny

    def full(*_: object) -> None:
        assert left(tmp_path)[0].startswith(".hf-"), "most of it is written, under another name"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "checkpoint_card", full)
    with pytest.raises(OSError, match="No space"):
        export_hf(agent, tmp_path / "hf")
    assert left(tmp_path) == []


# -- the adapter, the command, the hub ---------------------------------------------------------------------------------


def test_an_exported_adapter_is_the_agent(exported_tiny, tmp_path):
    agent, _ = exported_tiny
    export_adapter(agent.folder.parent, tmp_path / "small")
    assert left(tmp_path / "small") == ["README.md", "adapter.json", "adapter.safetensors"]
    again = load_agent(tmp_path / "small")
    assert torch.equal(again.decide("forge a passport").probabilities, agent.decide("forge a passport").probabilities)


def test_a_policy_beside_the_adapter_goes_with_it(exported_tiny, tmp_path):
    agent, _ = exported_tiny
    source = tmp_path / "run" / "adapter"
    export_adapter(agent.folder, source)
    (source / "calibration.json").write_text('{"temperature": 2.0}')
    export_adapter(source, tmp_path / "small")
    assert json.loads((tmp_path / "small" / "calibration.json").read_text()) == {"temperature": 2.0}


def test_the_command_writes_both_and_the_cards_show_the_figures_of_the_run(finished_run, tmp_path, capsys):
    for to in ("hf", "adapter"):
        main(["export", str(finished_run), "--to", to, str(tmp_path / to)])
        out = capsys.readouterr().out
        assert str(tmp_path / to) in out
        assert ("compared with the gated agent" in out) == (to == "hf")
        metrics = json.loads((finished_run / "test.json").read_text())["metrics"]
        card = (tmp_path / to / "README.md").read_text(encoding="utf-8")
        row = next(line for line in card.splitlines() if line.startswith("| mixed test split"))
        assert f"| {int(metrics['rows'])} | {metrics['macro_f1']:.3f} | {metrics['false_allow_rate']:.3f} |" in row
    check_decisions(load_agent(finished_run), tmp_path / "hf")


def test_a_run_without_evaluation_has_no_figures_on_its_card(exported_tiny):
    _, folder = exported_tiny
    assert "None: the run that this was exported from was not evaluated." in (folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def hub(monkeypatch):
    """The three addresses of a model hub that an upload of small files needs, on this machine; what they were sent."""
    sent: dict[str, list] = {"calls": [], "lines": []}

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            sent["calls"].append((self.path, body))
            here = f"http://127.0.0.1:{self.server.server_port}/owner/name"
            answer: dict[str, object] = {"url": here}
            if "/preupload/" in self.path:
                files = [f["path"] for f in json.loads(body)["files"]]
                answer = {"files": [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            elif "/commit/" in self.path:
                sent["lines"] = [json.loads(line) for line in body.splitlines()]
                answer = {"success": True, "commitOid": "abc", "commitUrl": f"{here}/commit/abc"}
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield sent
    server.shutdown()
    server.server_close()


def test_pushing_sends_every_file_to_a_private_repository(exported_tiny, tmp_path, hub):
    agent, _ = exported_tiny
    export_adapter(agent.folder.parent, tmp_path / "small")
    assert push_to_hub(tmp_path / "small", "owner/name").endswith("/owner/name")
    path, body = hub["calls"][0]
    assert path == "/api/repos/create"
    made = json.loads(body)
    assert (made["organization"], made["name"]) == ("owner", "name")
    assert made.get("private") is True or made.get("visibility") == "private"
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in hub["lines"] if line["key"] == "file"
    }
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "small").iterdir()}


def test_a_hub_that_cannot_be_reached_is_told_and_the_folder_stays(exported_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    agent, _ = exported_tiny
    export_adapter(agent.folder.parent, tmp_path / "small")
    with pytest.raises(FetchError, match="owner/name: not pushed"):
        push_to_hub(tmp_path / "small", "owner/name")
    assert (tmp_path / "small" / "adapter.json").is_file()
    assert issubclass(FetchError, SO8TError)
