"""Families of base models, each as a tiny random configuration: the rows of `docs/models.md`."""

from __future__ import annotations

from typing import Any, NamedTuple


class Family(NamedTuple):
    """A row of the table.

    Attributes:
        title: What people call the models.
        model_type: Of transformers.
        settings: What the tiny configuration has beside `makers`' usual sizes.
    """

    title: str
    model_type: str
    settings: dict[str, Any]


_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
_LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
           "qk_nope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 1, **_ROUTED}  # fmt: skip
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
          "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 1, "mamba_chunk_size": 8}
_LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 16, "patch_size": 8}  # fmt: skip
_QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
                "deepstack_visual_indexes": [0]}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}

FAMILIES = (
    Family("Llama 2", "llama", {}),
    Family("Llama 3.1, 3.2, 3.3", "llama", {"rope_parameters": _LLAMA3_ROPE}),
    Family("Llama 4 (text)", "llama4_text", {
        "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 8}),
    Family("Qwen 2, 2.5", "qwen2", {}),
    Family("Qwen 2 MoE", "qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    Family("Qwen 3", "qwen3", {}),
    Family("Qwen 3 MoE", "qwen3_moe", _EXPERTS),
    Family("Qwen3-Next", "qwen3_next", {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 32}),
    Family("Qwen 3.5 (text)", "qwen3_5_text", _DELTA),
    Family("Qwen 3.5 MoE (text)", "qwen3_5_moe_text", {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 32}),
    Family("Qwen3-VL, text only", "qwen3_vl", {
        "text_config": {"rope_parameters": _MROPE}, "vision_config": _QWEN_VISION}),
    Family("Qwen2.5-VL, text only", "qwen2_5_vl", {
        "text_config": {"rope_parameters": _MROPE},
        "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
                          "out_hidden_size": 64, "fullatt_block_indexes": [0]}}),
    Family("Gemma", "gemma", {}),
    Family("Gemma 2", "gemma2", {}),
    Family("Gemma 3 (1B)", "gemma3_text", {}),
    Family("Gemma 3 (4B and larger), text only", "gemma3", {
        "text_config": {**_WINDOWS, "query_pre_attn_scalar": 16}, "vision_config": _VISION,
        "mm_tokens_per_image": 4, "image_token_id": 300, "tie_word_embeddings": False}),
    Family("Gemma 3n (text)", "gemma3n_text", {
        "layer_types": ["full_attention"] * 3, "num_hidden_layers": 3, "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 320}),
    Family("Gemma 4 (text)", "gemma4_text", {
        **_WINDOWS, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 320, "global_head_dim": 16}),
    Family("Mistral 7B", "mistral", {}),
    Family("Ministral", "ministral", _WINDOWS),
    Family("Ministral 3", "ministral3", {}),
    Family("Mixtral", "mixtral", _EXPERTS),
    Family("Phi-3, Phi-4", "phi3", {}),
    Family("Phi 1.5, 2", "phi", {}),
    Family("Phi-3.5 MoE", "phimoe", {**_EXPERTS, "sliding_window": 8}),
    Family("gpt-oss", "gpt_oss", {**_EXPERTS, **_WINDOWS}),
    Family("SmolLM 2", "llama", {"tie_word_embeddings": True}),
    Family("SmolLM 3", "smollm3", {"no_rope_layers": [1, 0], "use_sliding_window": False}),
    Family("OLMo", "olmo", {}),
    Family("OLMo 2", "olmo2", {}),
    Family("OLMo 3", "olmo3", _WINDOWS),
    Family("OLMoE", "olmoe", _EXPERTS),
    Family("Granite 3", "granite", {
        "residual_multiplier": 0.3, "attention_multiplier": 0.1, "logits_scaling": 2.0, "embedding_multiplier": 2.0}),
    Family("Granite 3 MoE", "granitemoe", _EXPERTS),
    Family("Granite 4", "granitemoehybrid", {
        **_MAMBA, **_EXPERTS, "shared_intermediate_size": 32, "position_embedding_type": "nope",
        "layer_types": ["linear_attention", "full_attention"]}),
    Family("Falcon 3", "llama", {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    Family("Falcon-H1", "falcon_h1", {**_MAMBA, "mamba_d_ssm": 64}),
    Family("GLM-4 9B", "glm", {}),
    Family("GLM-4 0414", "glm4", {}),
    Family("GLM-4.5", "glm4_moe", {**_ROUTED, "first_k_dense_replace": 1, "use_qk_norm": True}),
    Family("DeepSeek V2", "deepseek_v2", _LATENT),
    Family("DeepSeek V3, R1", "deepseek_v3", {**_LATENT, "head_dim": 8}),
    Family("LFM2", "lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    Family("LFM2 MoE", "lfm2_moe", {
        **_EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    Family("Nemotron-H, Nemotron 3", "nemotron_h", {
        **_ROUTED, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "mamba_num_heads": 4,
        "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 32}),
    Family("Nemotron 4, Minitron", "nemotron", {}),
    Family("Bamba", "bamba", {**_MAMBA, "attn_layer_indices": [1]}),
    Family("Jamba", "jamba", {
        "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}),
    Family("OLMo Hybrid", "olmo_hybrid", _DELTA),
    Family("Command R", "cohere", {}),
    Family("Command R7B, A", "cohere2", _WINDOWS),
    Family("EXAONE 4", "exaone4", _WINDOWS),
    Family("ERNIE 4.5", "ernie4_5", {}),
    Family("Hunyuan", "hunyuan_v1_dense", {}),
    Family("Seed-OSS", "seed_oss", {}),
    Family("Apertus", "apertus", {}),
    Family("MiniMax M2", "minimax_m2", {**_EXPERTS, "rotary_dim": 8}),
    Family("StarCoder 2", "starcoder2", {}),
    Family("StableLM", "stablelm", {}),
    Family("Pythia, GPT-NeoX", "gpt_neox", {"rotary_pct": 0.5}),
    Family("GPT-2", "gpt2", {"n_layer": 2, "n_embd": 64, "n_head": 4}),
    Family("Mamba", "mamba", {}),
    Family("BART (decoder)", "bart", {"decoder_layers": 2}),
)  # fmt: skip
