"""Faults that engines of this kind have had: each is named here with the tests that would fail if this one had it.

Where nothing else tests it, the test stands below. What is left is in the README's known limits.
"""

import ast
import asyncio
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import httpx
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

import moejet
from moejet import LLM, AsyncLLM
from moejet.cli.main import main
from moejet.server import asgi_app
from moejet.testing.checkpoints import tiny_checkpoint
from moejet.testing.scripted_backend import ScriptedBackend

ROOT = Path(__file__).resolve().parents[2]
CHAT = "/v1/chat/completions"
HERE = "server/test_known_faults.py"

FAULTS: dict[str, tuple[str, ...]] = {
    "GGUF: empty, truncated, other magic, version or byte order": (
        "weights/test_gguf.py::test_wrong_headers_are_named",
        "weights/test_fuzz_headers.py::test_every_truncation_of_a_gguf",
        f"{HERE}::test_unreadable_models_end_a_command_with_one_line",
    ),
    "GGUF: counts and lengths near 2^62": (
        "weights/test_gguf.py::test_wrong_headers_are_named",
        "weights/test_gguf.py::test_claims_that_a_huge_sparse_file_could_hold",
    ),
    "GGUF: endless and nested arrays, truth values of 2": (
        "weights/test_gguf.py::test_wrong_headers_are_named",
        "weights/test_fuzz_headers.py::test_damaged_small_gguf",
    ),
    "GGUF: sizes that overflow or are zero": (
        "weights/test_gguf.py::test_wrong_headers_are_named",
        "weights/test_fuzz_headers.py::test_damaged_gguf_models",
    ),
    "tensors beyond the file, overlapping, misaligned": (
        "weights/test_gguf.py::test_wrong_headers_are_named",
        "weights/test_checkpoint.py::test_bad_headers",
        "weights/test_fuzz_headers.py::test_damaged_safetensors",
    ),
    "unknown types, doubled names, wrong alignment, values of another type": (
        "weights/test_gguf.py::test_wrong_headers_are_named",
        "weights/test_fuzz_headers.py::test_metadata_of_any_type",
        "weights/test_gguf_model.py::test_refused_metadata",
    ),
    "safetensors: huge, deep or contradictory headers": (
        "weights/test_checkpoint.py::test_bad_files",
        "weights/test_checkpoint.py::test_duplicate_name_in_one_header",
        "weights/test_fuzz_headers.py::test_headers_of_any_json",
        "weights/test_fuzz_headers.py::test_hostile_safetensors",
    ),
    "shards that are missing, wrong, of two revisions or elsewhere": (
        "weights/test_checkpoint.py::test_missing_shards",
        "weights/test_checkpoint.py::test_index_that_points_elsewhere",
        "hub/test_pull.py::test_wrong_bytes",
        "hub/test_pull.py::test_a_new_commit",
        "hub/test_pull.py::test_file_names_that_lead_elsewhere",
    ),
    "config.json: foreign code, impossible and absurd values": (
        "test_config.py::test_refusals_name_key_and_value",
        f"{HERE}::test_code_beside_a_model_is_never_run",
    ),
    "pickle": (
        "weights/test_checkpoint.py::test_other_formats_are_named",
        f"{HERE}::test_a_pickled_model_is_refused_unread",
        f"{HERE}::test_nothing_reads_pickles",
    ),
    "NaN and infinity in weights": (
        "server/test_known_faults.py::test_broken_weights_end_requests_with_their_reason",
        "server/test_known_faults.py::test_integer_formats_refuse_broken_weights_when_they_load",
        "asynchronous/test_failures.py::test_broken_logits_end_their_request_only",
    ),
    "tokenizers that do not fit or are damaged": (
        "test_tokenizer.py::test_broken_files",
        f"{HERE}::test_a_tokenizer_that_knows_more_than_the_model",
    ),
    "templates that reach for Python": (
        "server/test_faults.py::test_templates_in_requests_are_refused_or_sandboxed",
        "test_template_rendering.py::test_hostile_and_broken_templates",
    ),
    "templates that never end": ("test_template_rendering.py::test_endless_and_huge_templates",),
    "template variables that shadow the server's own or are huge": (
        "server/test_faults.py::test_template_variables_cannot_shadow_the_servers_own",
    ),
    "special tokens in a user's text": (
        "server/test_faults.py::test_special_tokens_in_a_users_text_stay_text",
        "server/test_faults.py::test_broken_up_text_gets_the_tokens_that_it_had",
    ),
    "prompts beyond the context, and huge ones": (
        "server/test_faults.py::test_a_prompt_beyond_the_context_is_counted_and_refused",
        "server/test_faults.py::test_a_long_prompt_holds_up_nobody",
    ),
    "impossible sampling values": (
        "server/test_faults.py::test_impossible_values_are_refused_by_name",
    ),
    "conversations that make no sense": (
        "server/test_faults.py::test_conversations_that_make_no_sense_are_refused",
        "server/test_faults.py::test_prompts_that_are_empty_or_none_are_refused",
    ),
    "bodies that are no proper JSON": (
        "server/test_faults.py::test_bodies_that_are_no_proper_json_are_refused",
        "server/test_faults.py::test_other_kinds_of_content_are_refused",
    ),
    "huge headers and bodies, slow and idle connections": (
        "server/test_guard.py::test_large_headers_and_bodies_are_refused",
        "server/test_guard.py::test_a_body_that_never_ends_is_given_up",
        "server/test_guard.py::test_an_enormous_header_is_refused_by_a_real_server",
        "server/test_guard.py::test_two_hundred_idle_connections_hold_up_nobody",
        "server/test_serve_command.py::test_connections_without_a_request_are_closed",
    ),
    "tools with wrong types, huge names, in thousands": (
        "server/test_faults.py::test_malformed_tools_are_refused",
        "server/test_faults.py::test_four_thousand_tools_are_refused",
    ),
    "schemas and grammars that are deep or recursive": (
        "server/test_faults.py::test_a_schema_nested_five_thousand_deep_is_refused",
        "server/test_faults.py::test_hostile_grammars_are_served_or_refused",
    ),
    "schemas that take minutes to compile": (
        "server/test_faults.py::test_hostile_schemas_are_refused",
        "server/test_faults.py::test_large_and_recursive_schemas_are_served_or_refused",
        "test_grammar.py::test_hostile_grammars_end_quickly",
    ),
    "schemas that refer elsewhere, cannot be met or allow endless white space": (
        "server/test_faults.py::test_hostile_schemas_are_refused",
        "server/test_faults.py::test_white_space_without_end_is_cut_off",
    ),
    "clients that leave": (
        "server/test_cancellation.py::test_what_a_leaving_client_asked_for_ends",
        "server/test_cancellation.py::test_hundreds_of_leaving_clients_leave_nothing_behind",
        f"{HERE}::test_a_client_that_leaves_in_the_middle_of_a_call",
    ),
    "clients that read slowly": (
        "server/test_cancellation.py::test_a_slow_reader_gets_everything_and_holds_up_nobody",
    ),
    "a thousand requests at once": (
        "server/test_faults.py::test_too_many_requests_are_refused_and_the_others_end",
        "server/test_faults.py::test_overload_is_answered_with_when_to_come_back",
    ),
    "long silences, and clients that ask again": (
        "server/test_chat.py::test_prompt_progress_and_signs_of_life_are_sent",
        f"{HERE}::test_who_asks_again_finds_what_was_computed",
    ),
    "markers of thinking and calls in any pieces": (
        "server/test_tool_parser.py::test_the_pieces_do_not_matter",
        "server/test_tool_parser.py::test_calls_inside_open_thinking",
        "test_thinking.py::test_any_chunking_gives_the_same",
        "server/test_deepseek_encoding.py::test_prompts_are_as_documented",
    ),
    "stop strings and characters over several tokens": (
        "test_output.py::test_pieces_do_not_matter",
        "test_output.py::test_stop_strings_inside_the_thinking_count_only_on_request",
        "test_tokenizer.py::test_never_half_a_character",
    ),
    "answers and thinking that do not end": (
        "test_grammar.py::test_thinking_that_fills_max_tokens",
        "test_policy.py::test_thinking_budget",
        "test_llm.py::test_context_ends_the_answer",
    ),
    "processes killed while they write": (
        "hub/test_pull.py::test_a_killed_download_goes_on",
        "weights/test_packed_cache.py::test_killed_at_random_points",
        "test_prefix_tier.py::test_killed_at_random_points",
    ),
    "damaged or foreign prefixes and sessions": (
        "test_prefix_tier.py::test_damage_is_noticed_and_computed_again",
        "test_prefix_tier.py::test_other_settings_have_other_prefixes",
        "test_session.py::test_damaged_sessions_are_refused",
    ),
    "disks that are full or refuse, caches that are shared": (
        "weights/test_packed_cache.py::test_no_room_on_the_disk",
        "weights/test_packed_cache.py::test_a_directory_that_may_not_be_written",
        "weights/test_packed_cache.py::test_two_writers_at_once",
        "test_prefix_tier.py::test_a_full_disk_is_reported_once",
        "test_prefix_tier.py::test_processes_share_the_directory",
    ),
    "weight files that change while they are mapped": (
        "server/test_lost_weights.py::test_a_file_cut_short_and_a_model_that_is_gone",
        "server/test_supervisor.py::test_running_requests_fail_at_once_and_the_engine_comes_back",
    ),
    "too little memory, now or later": (
        "test_plan.py::test_loading_refuses_what_cannot_fit",
        "gpu_runtime/test_gpu_memory.py::test_too_little_vram_is_refused_with_the_numbers",
        "server/test_serve_command.py::test_the_engine_killed_in_mid_stream",
        "test_topology.py::test_available_memory_is_the_tightest_limit",
    ),
    "processors that lack instructions, odd machines": (
        "csrc/test_isa.py::test_no_instruction_leaks_into_a_narrower_set",
        "csrc/test_isa.py::test_unusable_names_are_refused_with_the_reason",
        "test_topology.py::test_numa_nodes_also_without_cpus",
    ),
    "other users' processes, frames that are pickles": (
        "server/test_engine_process.py::test_the_engine_listens_nowhere_and_ends_with_the_server",
        "server/test_engine_process.py::test_the_engine_drops_a_peer_that_talks_nonsense",
    ),
    "foreign pages, other keys' prefixes, keys in logs": (
        "server/test_guard.py::test_only_own_names_are_answered",
        "server/test_guard.py::test_foreign_pages_are_refused_unless_allowed",
        "server/test_guard.py::test_logs_hold_no_prompts_and_no_keys",
        "server/test_cache_salt.py::test_keys_share_no_prefixes_and_a_key_finds_its_own",
    ),
}


@cache
def _tests_of(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_tests(fault):
    for place in FAULTS[fault]:
        file, _, name = place.partition("::")
        assert name.startswith("test_")
        assert name in _tests_of(file), place


def test_the_list_is_whole():
    assert len(FAULTS) == 40


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "truncated"), (b"GGUF\0\0\0\3" + bytes(16), "big-endian"), (b"GGML", "truncated")],
)
def test_unreadable_models_end_a_command_with_one_line(tmp_path, capsys, content, words):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    assert main(["run", str(file), "hello"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_pickled_model_is_refused_unread(tmp_path, capsys):
    model = tiny_checkpoint(tmp_path / "m", "deepseek_v3")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert main(["run", str(model), "hello"]) == 2
    error = capsys.readouterr().err
    assert "convert it to safetensors" in error
    assert error.count("\n") == 1


def test_code_beside_a_model_is_never_run(tmp_path):
    model = tiny_checkpoint(
        tmp_path / "m", "deepseek_v3", auto_map={"AutoModelForCausalLM": "modeling_x.Model"}
    )
    proof = tmp_path / "it_ran"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "conftest.py"):
        (model / name).write_text(f"open({str(proof)!r}, 'w').close()")
    with LLM(model) as llm:
        assert llm.generate([[1, 2, 3]])
    assert not proof.exists()


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_nothing_reads_pickles():
    for file in Path(moejet.__file__).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        names = {name.partition(".")[0] for name in _imports(ast.parse(text))}
        assert not names & {"pickle", "cloudpickle", "dill", "shelve", "joblib"}, file
        assert re.search(r"torch\.load\b|allow_pickle=True|trust_remote_code=True", text) is None


def _spoilt(path, part):
    """A checkpoint with one NaN in a tensor."""
    model = tiny_checkpoint(path, "deepseek_v3")
    weights = load_file(model / "model.safetensors")
    [name, *_] = [name for name in weights if part in name]
    weights[name].view(-1)[3] = torch.nan
    save_file(weights, model / "model.safetensors")
    return model


@pytest.mark.parametrize("part", ["mlp.experts.0.down_proj", "self_attn.o_proj", "lm_head"])
def test_integer_formats_refuse_broken_weights_when_they_load(tmp_path, part):
    with pytest.raises(ValueError, match=rf"{part}.* contains NaN or infinity"):
        LLM(_spoilt(tmp_path / "m", part))


def test_broken_weights_end_requests_with_their_reason(tmp_path, ask_app):
    llm = AsyncLLM(_spoilt(tmp_path / "m", "model.norm.weight"))
    ask = ask_app(asgi_app(llm))
    body = {"prompt": [5, 6, 7], "max_tokens": 3}
    for _ in range(2):
        reply = ask("/v1/completions", body)
        assert (reply.status, reply.json["error"]["code"]) == (500, "nonfinite_logits")
        stream = ask("/v1/completions", {**body, "stream": True})
        assert "NaN or infinite logits" in stream.text
    assert ask("/health").status == 200
    assert llm.counters()["finished_samples"]["error"] == 4
    asyncio.run(llm.close(drain=False))


def test_a_tokenizer_that_knows_more_than_the_model(tmp_path, ask_app, caplog):
    """Some published ones do; a text with such a token is refused and never looked up in the embedding."""
    model = tiny_checkpoint(tmp_path / "m", "deepseek_v3")
    file = str(model / "tokenizer.json")
    raw = tokenizers.Tokenizer.from_file(file)
    raw.add_tokens([f"extra{i}" for i in range(60)])
    raw.save(file)
    llm = AsyncLLM(model)
    assert "the tokenizer has" in caplog.text
    ask = ask_app(asgi_app(llm))
    reply = ask("/v1/completions", {"prompt": "a extra59 b", "max_tokens": 1})
    assert reply.status == 400
    assert "outside the vocabulary of 320" in reply.json["error"]["message"]
    assert ask("/v1/completions", {"prompt": "extra5 b", "max_tokens": 1}).status == 200
    asyncio.run(llm.close(drain=False))


def test_a_client_that_leaves_in_the_middle_of_a_call(serve, tool_tokenizer, eventually):
    call = '<tool_call>\n{"name": "add", "arguments": {"a": "' + "x" * 500 + '"}}\n</tool_call>'
    backend = ScriptedBackend([f"Yes.\n</think>\n\n{call}"], tool_tokenizer, delay_s=0.005)
    server = serve(asgi_app(backend))
    parameters = {"type": "object", "properties": {"a": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": parameters}}]
    body = {"messages": [{"role": "user", "content": "x"}], "tools": tools, "stream": True}
    with httpx.stream("POST", server.url + CHAT, json=body, timeout=30) as stream:
        assert any('"arguments":"{' in line for line in stream.iter_lines())
    eventually(lambda: backend.streams[0].is_closed)
    num_read = backend.num_read
    assert num_read < 400
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_who_asks_again_finds_what_was_computed(serve, eventually):
    """What a client that gave up has had computed of its prompt is not computed again, and never twice at once."""
    llm = AsyncLLM(max_batch_tokens=32)
    server = serve(asgi_app(llm))
    body = {"prompt": list(range(5, 105)) * 15, "max_tokens": 1}

    async def give_up():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            steps = llm.counters()["steps"]
            request = asyncio.ensure_future(client.post("/v1/completions", json=body))
            while llm.counters()["steps"] < steps + 8:
                assert not request.done()
                await asyncio.sleep(0.001)
            request.cancel()

    asyncio.run(give_up())
    eventually(lambda: llm.health()["requests"] == 0)
    reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] >= 7 * 32
    assert llm.counters()["prefill_tokens"] < 1500 + 4 * 32
    asyncio.run(llm.close(drain=False))
