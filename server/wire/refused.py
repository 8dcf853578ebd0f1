"""Fields that OpenAI or vLLM know and no endpoint here takes, each with the reason that its client is told."""

from __future__ import annotations

from collections.abc import Mapping

_PROMPT = "how the prompt is built is the server's"
_INTERNAL = "it is internal to the engine"
_BYPASS = "it would bypass steering"
_TEXT = "this server reads and writes text only"
_SHOWS = "it would show refusal tokens"
_UNPROVED = "it is not proved to work with steering"

REFUSED: Mapping[str, str] = {
    "add_generation_prompt": _PROMPT,
    "add_special_tokens": _PROMPT,
    "allowed_token_ids": _BYPASS,
    "audio": _TEXT,
    "bad_words": _BYPASS,
    "best_of": "use n",
    "chat_template": _PROMPT,
    "continue_final_message": _PROMPT,
    "documents": _PROMPT,
    "ec_transfer_params": _INTERNAL,
    "extra_args": _INTERNAL,
    "kv_transfer_params": _INTERNAL,
    "length_penalty": _UNPROVED,
    "logits_processors": "code is never accepted",
    "logprob_token_ids": _SHOWS,
    "media_io_kwargs": _TEXT,
    "mm_payload": _TEXT,
    "mm_processor_kwargs": _TEXT,
    "moderation": "this server does not moderate; see steering",
    "prediction": "this server does not do it",
    "priority": _INTERNAL,
    "prompt_embeds": "tensors are never accepted",
    "prompt_logprobs": "it is internal to the engine; POST /v1/completions has echo",
    "repetition_detection": _UNPROVED,
    "request_id": "the server makes its own",
    "return_mm_kwargs": _TEXT,
    "return_prompt_text": _PROMPT,
    "return_token_ids": _SHOWS,
    "return_token_offsets": _PROMPT,
    "return_tokens_as_token_ids": _SHOWS,
    "routed_experts_prompt_start": _INTERNAL,
    "session_id": _INTERNAL,
    "skip_special_tokens": _SHOWS,
    "spaces_between_special_tokens": _SHOWS,
    "stream_interval": _INTERNAL,
    "structured_outputs": "use response_format",
    "truncate_prompt_tokens": _PROMPT,
    "truncation_side": _PROMPT,
    "use_beam_search": _UNPROVED,
    "vllm_xargs": "use steering",
    "watermarking": _UNPROVED,
    "web_search_options": "this server does not search",
}
