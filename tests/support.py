"""What steering works with, as the README says it, each row with the test that proves it.

`python -m tests.support` writes the table into the README; `tests/unit/test_support_matrix.py` holds the two together.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- support matrix: made by `python -m tests.support` -->", "<!-- end of the support matrix -->"


@dataclass(frozen=True)
class Row:
    """One thing that vLLM does.

    Attributes:
        feature: as its documentation calls it.
        test: that proves what is claimed, as `module::name` or `module::Class::name`.
        refused: what an engine that is started with it says; empty where it works.
        limits: what the claim leaves out.
    """

    feature: str
    test: str
    refused: str = ""
    limits: str = ""


SUPPORT = (
    Row("chunked prefill", "test_mixed_batch::TestMixedBatch::test_each_request_is_edited_as_the_oracle_says"),
    Row("preemption", "test_gate::TestGate::test_every_answer_is_the_one_its_decision_leads_to"),
    Row(
        "prefix caching",
        "test_prefix_cache::TestRandomTalks::test_each_answer_is_that_of_an_engine_without_prefix_caching",
    ),
    Row("torch.compile, its cache", "test_runners::test_compiled_engine_is_right_on_any_cache"),
    Row(
        "CUDA graphs, full and piecewise",
        "test_runners::test_the_op_cuts_no_graph",
        limits="by the graphs they are made of, cut as on a GPU; none was captured here",
    ),
    Row(
        "model runner V2",
        "test_runners::TestModelRunnerV2::test_each_request_is_edited_as_the_oracle_says",
        limits="on Triton's interpreter",
    ),
    Row("`n` > 1", "test_mixed_batch::TestMixedBatch::test_each_request_gets_the_tokens_it_gets_alone"),
    Row(
        "clones that go on with a part of an answer",
        "test_support::TestSteps::test_clones_go_on_from_the_end_of_the_prompt",
    ),
    Row(
        "vLLM's own beam search",
        "test_scheduler::test_beams_of_vllms_own_search_end_with_an_error",
        refused="each request: vLLM's beam search drops the plan of a request; a steering engine runs none",
    ),
    Row(
        "abort: waiting, in mid-prefill, decoding",
        "test_support::TestSteps::test_abort_in_each_phase_leaves_neighbours_right",
    ),
    Row(
        "asynchronous scheduling",
        "test_support::test_scheduling_ahead_changes_nothing",
        limits="runner V1 and, on Triton's interpreter, V2; off: every other test",
    ),
    Row("structured output", "test_gateway::test_vllms_features_pass_through"),
    Row("tools", "test_gateway::test_a_tool_that_must_be_called_is_called"),
    Row("logprobs", "test_parity::test_steered_logprobs_equal_transformers_with_hooks"),
    Row("prompt logprobs", "test_support::TestSteps::test_prompt_logprobs_are_those_of_what_is_edited"),
    Row(
        "n-gram speculation",
        "test_support::test_ngram_speculation_changes_no_token",
        limits="runner V1, without response probe, spared reasoning or capture: those are refused with it",
    ),
    Row(
        "draft-model speculation, EAGLE, MTP",
        "test_refusals::test_unproved_option_of_vllm_is_refused_by_name",
        refused="speculative_config=draft_model: only method 'ngram' on model runner V1 is proved; start without it",
    ),
    Row("tensor parallel", "test_gate::test_gates_on_the_other_runner_and_on_two_ranks"),
    Row(
        "expert parallel",
        "test_compat::test_each_unproved_option_is_refused_by_name",
        refused="enable_expert_parallel=True: not proved yet; tensor parallelism splits each expert instead",
    ),
    Row(
        "pipeline parallel",
        "test_refusals::test_unproved_option_of_vllm_is_refused_by_name",
        refused="pipeline_parallel_size=2: not proved yet; use 1",
    ),
    Row(
        "data parallel",
        "test_refusals::test_unproved_option_of_vllm_is_refused_by_name",
        refused="data_parallel_size=2: start one server per GPU",
    ),
    Row(
        "decode context parallel",
        "test_refusals::test_unproved_option_of_vllm_is_refused_by_name",
        refused="decode_context_parallel_size=2: not proved yet; use 1",
    ),
    Row(
        "prefill context parallel",
        "test_compat::test_each_unproved_option_is_refused_by_name",
        refused="prefill_context_parallel_size=2: tokens are permuted over ranks; use 1",
    ),
    Row(
        "vLLM's Ray executor",
        "test_compat::test_each_unproved_option_is_refused_by_name",
        refused="distributed_executor_backend=ray: it goes past the worker that steers; use mp",
    ),
    Row(
        "sampling sharded over ranks",
        "test_compat::test_each_unproved_option_is_refused_by_name",
        refused="enable_batch_sharded_sampling=True: it goes past what tells of a step; switch it off",
    ),
    Row(
        "dual batch overlap",
        "test_compat::test_each_unproved_option_is_refused_by_name",
        refused="enable_dbo=True: micro-batches split the row map",
    ),
    Row(
        "LoRA",
        "test_refusals::test_an_engine_checks_its_configuration",
        refused="enable_lora=True: a bundle is bound to base weights",
    ),
    Row(
        "sleep mode",
        "test_compat::test_each_unproved_option_is_refused_by_name",
        refused="enable_sleep_mode=True: the bank would be discarded",
    ),
    Row(
        "quantised weights",
        "test_support::test_quantised_weights_are_steered",
        limits="proved on compressed-tensors W8A8; other kinds start as well",
    ),
    Row(
        "KV connectors, KV offload",
        "test_refusals::test_unproved_option_of_vllm_is_refused_by_name",
        refused="kv_transfer_config=True: edited KV must not leave this engine",
    ),
    Row(
        "prompt embeddings",
        "test_refusals::test_unproved_option_of_vllm_is_refused_by_name",
        refused="enable_prompt_embeds=True: tensors from clients are refused",
    ),
    Row(
        "pooling tasks",
        "test_refusals::test_unproved_option_of_vllm_is_refused_by_name",
        refused="runner=pooling: generation only",
    ),
    Row(
        "multimodal wrappers, other architectures",
        "test_refusals::test_architecture_outside_the_table_is_refused_by_name",
        refused="architecture … cannot be steered; supported: …",
    ),
    Row(
        "several API server processes",
        "test_compat::test_each_unproved_option_is_refused_by_name",
        refused="api_server_count=2: not proved yet; use 1",
    ),
)


def table() -> str:
    """The README's table."""
    lines = ["| vLLM's | steering | test |", "|---|---|---|"]
    for row in SUPPORT:
        said = f"refused: `{row.refused}`" if row.refused else "yes" + (f", {row.limits}" if row.limits else "")
        lines.append(f"| {row.feature} | {said} | `{row.test}` |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """The README with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def known_tests(module: str) -> set[str]:
    """Names of the tests of the modules of that name under `tests/`, with their classes, as `Row.test` has them."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = set()
    for path in (ROOT / "tests").rglob(f"{module}.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, functions):
                found.add(f"{module}::{node.name}")
            if isinstance(node, ast.ClassDef):
                found |= {f"{module}::{node.name}::{each.name}" for each in node.body if isinstance(each, functions)}
    return found


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text()))
