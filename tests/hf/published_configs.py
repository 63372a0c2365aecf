"""config.json files in the form in which well-known checkpoints publish them (the older one, with
`rope_theta` and `rope_scaling`): the fields that their models compute with, and a few that not."""

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
         "attention_dropout": 0.0, "hidden_act": "silu", "mlp_bias": False, "pretraining_tp": 1,
         "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "use_cache": True,
         "rope_scaling": None, "tie_word_embeddings": False, "initializer_range": 0.02}
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                  "original_max_position_embeddings": 8192}
QWEN = {"attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
        "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
        "use_cache": True, "use_sliding_window": False}
GEMMA = {"attention_bias": False, "attention_dropout": 0.0, "cache_implementation": "hybrid",
         "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
         "query_pre_attn_scalar": 256, "torch_dtype": "float32", "use_cache": True,
         "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}

PUBLISHED = {
    "llama-2-7b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000,
                   "max_position_embeddings": 4096, "num_attention_heads": 32,
                   "num_hidden_layers": 32, "num_key_value_heads": 32},
    "llama-3.1-8b": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rope_theta": 500000.0,
        "rope_scaling": {**LLAMA3_SCALING, "factor": 8.0}},
    "llama-3.2-1b": {
        **LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128256,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "head_dim": 64, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "rope_scaling": {**LLAMA3_SCALING, "factor": 32.0}},
    "smollm2-135m": {
        **LLAMA, "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152,
        "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30,
        "num_key_value_heads": 3, "rope_theta": 100000, "tie_word_embeddings": True,
        "is_llama_config": True, "rope_interleaved": False},
    "mistral-7b-v0.1": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": False, "vocab_size": 32000},
    "mistral-7b-v0.3": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None,
        "tie_word_embeddings": False, "vocab_size": 32768, "attention_dropout": 0.0},
    "qwen2.5-0.5b": {
        **QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False,
        "vocab_size": 151936},
    "qwen3-0.6b": {
        **QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024,
        "attention_bias": False, "head_dim": 128, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "vocab_size": 151936},
    "gemma-2-2b": {
        **GEMMA, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2",
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_size": 2304,
        "hidden_act": "gelu_pytorch_tanh", "intermediate_size": 9216, "vocab_size": 256000,
        "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
        "num_key_value_heads": 4, "rope_theta": 10000.0, "sliding_window": 4096},
    "gemma-2-9b": {
        **GEMMA, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2",
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_size": 3584,
        "hidden_act": "gelu_pytorch_tanh", "intermediate_size": 14336, "vocab_size": 256000,
        "max_position_embeddings": 8192, "num_attention_heads": 16, "num_hidden_layers": 42,
        "num_key_value_heads": 8, "rope_theta": 10000.0, "sliding_window": 4096,
        "sliding_window_size": 4096},
    "gemma-3-4b": {  # the text_config of the model of text and images, as transformers writes it
        **GEMMA, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "hidden_size": 2560,
        "intermediate_size": 10240, "vocab_size": 262208, "max_position_embeddings": 131072,
        "num_attention_heads": 8, "num_hidden_layers": 34, "num_key_value_heads": 4,
        "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024, "sliding_window_pattern": 6},
    "gemma-3-1b": {
        **GEMMA, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "hidden_size": 1152,
        "intermediate_size": 6912, "vocab_size": 262144, "max_position_embeddings": 32768,
        "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6},
    "granite-3.1-8b": {
        "architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_bias": False,
        "attention_dropout": 0.1, "attention_multiplier": 0.0078125, "bos_token_id": 0,
        "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12800,
        "logits_scaling": 16.0, "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
        "pad_token_id": 0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-5,
        "rope_scaling": None, "rope_theta": 10000000.0, "tie_word_embeddings": True,
        "vocab_size": 49155},
}
