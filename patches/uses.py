"""What our code relies on in sglang, file by file: the part of a patch's contract that goes beyond its target.

`Use(class, attributes)`, or `Use(function, arguments that we pass)`. A test sees that every name here is one that our code
has, and that everything which our code imports from sglang stands here.
"""

from __future__ import annotations

from sglang_ets.patches.record import Use

SRT = "sglang.srt"
SCHEDULER = f"{SRT}.managers.scheduler.Scheduler"
BATCH = f"{SRT}.managers.schedule_batch"
RADIX = f"{SRT}.mem_cache.unified_radix_cache.UnifiedRadixCache"
TREE_CORE = f"{SRT}.mem_cache.unified_cache.unified_tree_core_interface"
ALLOCATOR = f"{SRT}.mem_cache.allocator.base.BaseTokenToKVPoolAllocator"
RUNTIME = f"{SRT}.runtime_context"
WORKER = f"{SRT}.managers.tp_worker.TpModelWorker"
STREAMER = f"{SRT}.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
PROTOCOL = f"{SRT}.entrypoints.openai.protocol"
OPENAI_BASE = f"{SRT}.entrypoints.openai.serving_base.OpenAIServingBase"
TOKENIZER_MANAGER = f"{SRT}.managers.tokenizer_manager.TokenizerManager"
FIELDS = f"{SRT}.arg_groups.fields"  # of ServerArgs, which is put together from them

# kv.py
LEDGER = (
    Use(RADIX, ("tree_core", "tree_components")),
    Use(f"{RADIX}.lock", ("node_id",)),
    Use(f"{RADIX}.unlock", ("lock",)),
    Use(f"{RADIX}.protected_size"),
    Use(f"{RADIX}.evictable_size"),
    Use(f"{RADIX}._evict_device_leaf", ("node_id", "tracker")),
    Use(f"{TREE_CORE}.UnifiedTreeCoreInterface.collect_path_info", ("end_node_ids",)),
    Use(
        f"{TREE_CORE}.TreePathNodeInfo",
        ("node_id", "parent_id", "path_start", "path_end", "full_value_len", "num_children"),
    ),
    Use(ALLOCATOR, ("free_group",)),
    Use(f"{ALLOCATOR}.available_size"),
    Use(f"{ALLOCATOR}.free_group_begin"),
    Use(f"{ALLOCATOR}.free_group_end"),
)

# engine/coordinator.py: how a search answers
ANSWER = (
    Use(SCHEDULER, ("output_streamer",)),
    Use(f"{STREAMER}.stream_output", ("reqs", "return_logprob")),
    Use(f"{BATCH}.Req", ("output_ids", "finished_reason", "customized_info", "time_stats", "stream", "rid")),
    Use(f"{BATCH}.FINISH_LENGTH.__init__", ("length",)),
    Use(f"{BATCH}.FINISH_ABORT.__init__", ("message", "status_code")),
    Use(f"{SRT}.observability.req_time_stats.SchedulerReqTimeStats", ("set_completion_time",)),
)

# engine/coordinator.py and engine/admission.py: how a search begins
ADMISSION = (
    Use(
        SCHEDULER,
        ("server_args", "waiting_queue", "processed_tokens_counter", "max_total_num_tokens", "tokenizer"),
    ),
    Use(f"{SCHEDULER}._set_or_validate_priority", ("req",)),
    Use(f"{SCHEDULER}._release_aborted_request", ("req",)),
    Use(f"{SRT}.disaggregation.utils.prepare_abort", ("req", "error_message", "status_code")),
    Use(f"{BATCH}.Req", ("to_finish", "finished", "sampling_params", "origin_input_ids", "arrival_processed_tokens")),
    Use(f"{SRT}.observability.req_time_stats.SchedulerReqTimeStats", ("set_wait_queue_entry_time",)),
    Use(f"{RUNTIME}.get_parallel"),
    *ANSWER,
)

# engine/children.py
CHILD = (
    Use(
        f"{BATCH}.Req.__init__",
        (
            *("rid", "origin_input_text", "origin_input_ids", "sampling_params", "eos_token_ids", "vocab_size"),
            *("priority", "cache_salt", "extra_key", "metrics_collector"),
        ),
    ),
    Use(f"{BATCH}.Req", ("tokenizer", "logprob_start_len", "output_ids_through_stop", "last_node")),
    Use(
        f"{SRT}.sampling.sampling_params.SamplingParams",
        (
            *("custom_params", "n", "max_new_tokens", "sampling_seed", "stop_strs", "stop_str_max_len"),
            "stop_token_ids",
        ),
    ),
    Use(f"{BATCH}.FINISH_MATCHED_TOKEN", ("matched",)),
    Use(f"{BATCH}.FINISH_MATCHED_STR", ("matched",)),
    Use(f"{BATCH}.FINISHED_MATCHED_REGEX", ("matched",)),
)

# prm/stream.py
FORWARD_STREAM = (Use(SCHEDULER, ("enable_overlap", "forward_stream", "forward_stream_ctx", "schedule_stream")),)

# engine/forks.py: children that start in the running batch
FORK = (
    *FORWARD_STREAM,
    Use(
        SCHEDULER,
        (
            *("running_batch", "last_batch", "waiting_queue", "tree_cache", "token_to_kv_pool_allocator", "page_size"),
            *("req_to_token_pool", "future_map", "model_config", "enable_overlap", "spec_algorithm"),
            *("max_running_requests", "new_token_ratio_tracker", "enable_hierarchical_cache", "enable_hisparse"),
        ),
    ),
    Use(f"{RADIX}.path_device_indices", ("node",)),
    Use(f"{RADIX}.lock", ("node_id",)),
    Use(f"{SRT}.mem_cache.unified_cache.components.ComponentType", ("FULL",)),
    Use(f"{SRT}.mem_cache.memory_pool.ReqToTokenPool.alloc", ("reqs",)),
    Use(f"{SRT}.mem_cache.memory_pool.ReqToTokenPool.write", ("indices", "values")),
    Use(f"{SRT}.mem_cache.memory_pool.ReqToTokenPool.available_size"),
    Use(
        f"{BATCH}.ReqKvInfo",
        ("req_pool_idx", "cache_protected_len", "cache_inserted_len", "kv_committed_len", "kv_allocated_len"),
    ),
    Use(f"{BATCH}.Req", ("kv", "lock", "last_node", "prefix_len", "extend_end", "cached_tokens", "output_ids")),
    Use(f"{BATCH}.Req.refresh_fill_ids"),
    Use(f"{BATCH}.Req._stop_match_tail_len", ("new_accepted_len",)),
    Use(
        f"{BATCH}.ScheduleBatch.init_new",
        (
            *("reqs", "req_to_token_pool", "token_to_kv_pool_allocator", "tree_cache", "model_config"),
            *("enable_overlap", "spec_algorithm"),
        ),
    ),
    Use(
        f"{BATCH}.ScheduleBatch",
        (
            *("reqs", "is_empty", "batch_is_full", "forward_mode", "req_pool_indices", "req_pool_indices_cpu"),
            *("seq_lens", "seq_lens_cpu", "orig_seq_lens", "multimodal_inputs", "sampling_info"),
        ),
    ),
    Use(f"{BATCH}.ScheduleBatch.filter_batch"),
    Use(f"{BATCH}.ScheduleBatch.merge_batch", ("other",)),
    Use(f"{SRT}.managers.overlap_utils.FutureMap.stash", ("future_indices", "payload")),
    Use(f"{SRT}.managers.overlap_utils.RelayPayload", ("bonus_tokens",)),
    Use(f"{SRT}.model_executor.forward_batch_info.ForwardMode", ("DECODE",)),
    Use(f"{SRT}.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch", ("batch", "vocab_size")),
    Use(
        f"{SRT}.observability.req_time_stats.SchedulerReqTimeStats",
        ("set_forward_entry_time", "set_prefill_finished_time"),
    ),
    Use(
        f"{SRT}.sampling.sampling_params.SamplingParams",
        ("frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens"),
    ),
)

# engine/strands.py: nodes that share a row of the batch
STRAND = (
    Use(SCHEDULER, ("tp_worker", "tree_cache")),
    Use(f"{SRT}.model_executor.model_runner.ModelRunner", ("sampler",)),
    Use(f"{RUNTIME}.get_exec"),
    Use(f"{SRT}.layers.sampler.Sampler"),
    Use(f"{SRT}.layers.logits_processor.LogitsProcessorOutput", ("next_token_logits",)),
    Use(
        f"{SRT}.sampling.sampling_batch_info.SamplingBatchInfo",
        (
            *("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed", "grammars", "grammar_mask", "rids_int"),
            *("bootstrap_room_ids_int", "penalizer_orchestrator", "acc_additive_penalties", "acc_scaling_penalties"),
            *("has_custom_logit_processor", "custom_params", "custom_logit_processor", "return_sampling_masks"),
            *("return_sampling_support_logprobs", "sampling_mask_batch_indices", "sampling_mask_top_ks", "logit_bias"),
            "sampling_support_logprobs_capture_indices",
        ),
    ),
    Use(f"{SRT}.managers.utils.GenerationBatchResult", ("delay_sample_func",)),
    Use(f"{BATCH}.ScheduleBatch", ("reqs", "forward_mode", "extend_lens")),
    Use(f"{BATCH}.Req", ("seqlen", "origin_input_ids", "output_ids", "extra_key", "cache_salt", "last_node")),
    Use(f"{BATCH}.Req.refresh_fill_ids"),
    Use(f"{BATCH}.Req.update_finish_state", ("new_accepted_len",)),
    Use(f"{RADIX}.checkpoint", ("req", "up_to")),
    Use(f"{RADIX}.match_prefix", ("params",)),
    Use(f"{SRT}.mem_cache.base_prefix_cache.MatchPrefixParams", ("key",)),
    Use(f"{SRT}.mem_cache.radix_cache.RadixKey.__init__", ("token_ids", "extra_key", "cache_salt")),
)

# engine/token_states.py and engine/children.py: the hidden states that tokens were sampled from
TOKEN_STATES = (
    Use(f"{SRT}.model_executor.forward_batch_info.CaptureHiddenMode", ("LAST", "is_full")),
    Use(f"{SRT}.model_executor.forward_batch_info.get_server_return_hidden_states_mode"),
    Use(f"{BATCH}.Req", ("return_hidden_states_mode",)),
    Use(f"{BATCH}.ScheduleBatch", ("return_hidden_states_mode", "forward_mode")),
    Use(f"{SRT}.managers.utils.GenerationBatchResult", ("logits_output", "extend_input_len_per_req")),
    Use(f"{SRT}.layers.logits_processor.LogitsProcessorOutput", ("hidden_states",)),
    Use(
        f"{FIELDS}.exec_.ExecFeatures",
        (
            "return_hidden_states_mode",
            "enable_return_hidden_states",
            "enable_return_aux_hidden_states",
            "return_aux_hidden_state_layer_ids",
        ),
    ),
    Use(f"{SRT}.arg_groups.validation_hook.handle_aux_hidden_state_capture", ("server_args",)),
)

# engine/coordinator.py and engine/pressure.py: what a tick looks like
TICK = (
    Use(
        SCHEDULER,
        ("running_batch", "waiting_queue", "tree_cache", "token_to_kv_pool_allocator", "page_size"),
    ),
    Use(f"{BATCH}.NextBatchPlan", ("batch_to_run", "running_batch")),
    Use(f"{BATCH}.ScheduleBatch", ("reqs", "is_empty")),
)

# engine/coordinator.py: how the children of a search that has ended are ended
ABORT = (
    Use(f"{SRT}.managers.io_struct.AbortReq", ("rid", "abort_all", "abort_message")),
    Use(f"{SCHEDULER}.abort_request", ("recv_req",)),
)

# engine/step_queue.py: what sglang counts when its waiting queue is bounded
QUEUE_LIMIT = (Use(SCHEDULER, ("waiting_queue", "max_queued_requests")),)

# engine/coordinator.py: how a request is refused that sglang could not read
REFUSAL = (
    Use(f"{SRT}.managers.io_struct.AbortReq", ("rid", "finished_reason")),
    Use(f"{SCHEDULER}.send_abort_output", ("abort_req", "req")),
)

# engine/startup.py, engine/metrics.py and prm/: a second model in the process
PRM_START = (
    Use(SCHEDULER, ("server_args", "tp_worker", "tokenizer", "nccl_port", "metrics_collector_context")),
    Use(
        f"{SRT}.observability.metrics_collector.SchedulerMetricsCollectorContext",
        ("current_scheduler_metrics_enabled", "collector"),
    ),
    Use(f"{RUNTIME}.get_device"),
    Use(f"{RUNTIME}.get_context"),
    Use(f"{RUNTIME}.create_context", ("server_args", "role", "ranks")),
    Use(f"{RUNTIME}.use_context", ("context",)),
    Use(f"{RUNTIME}.SpawnRanks", ("world_rank", "dp_rank", "gpu_id")),
    Use(f"{RUNTIME}.RuntimeContext", ("parallel",)),
    Use(f"{RUNTIME}.ParallelContext", ("_stamp", "override_permanently")),
    Use(f"{SRT}.server_args.ServerArgs"),
    Use(f"{FIELDS}.model.Model", ("model_path", "load_format", "trust_remote_code", "dtype")),
    Use(f"{FIELDS}.device.Device", ("device", "random_seed")),
    Use(f"{FIELDS}.exec_.ExecKernel", ("attention_backend",)),
    Use(f"{FIELDS}.exec_.ExecGraph", ("disable_cuda_graph",)),
    Use(f"{FIELDS}.parallel.Parallel", ("tp_size", "tp_group", "pp_group", "world_group")),
    Use(f"{FIELDS}.schedule.Schedule", ("disable_overlap_schedule", "max_total_tokens")),
    Use(f"{FIELDS}.serving.Serving", ("skip_tokenizer_init",)),
    Use(f"{WORKER}.__init__", ("server_args", "gpu_id", "nccl_port")),
    Use(f"{SRT}.utils.hf_transformers_utils.get_tokenizer", ("tokenizer_name", "trust_remote_code")),
    Use(f"{SRT}.models.registry.ModelRegistry", ("models",)),
    *(
        Use(f"{SRT}.models.{family}.{family.capitalize()}ForCausalLM.__init__", ("config", "quant_config", "prefix"))
        for family in ("llama", "mistral", "qwen2", "qwen3")
    ),
)

# prm/engine.py: its pools and its radix cache
PRM_POOLS = (
    Use(f"{WORKER}.alloc_memory_pool"),
    Use(f"{WORKER}.init_attention_backends"),
    Use(f"{WORKER}.init_cuda_graphs"),
    Use(f"{WORKER}.get_memory_pool"),
    Use(WORKER, ("model_runner", "model_config")),
    Use(f"{SRT}.model_executor.model_runner.ModelRunner", ("model", "page_size")),
    Use(f"{RADIX}.__init__", ("params",)),
    Use(
        f"{SRT}.mem_cache.cache_init_params.CacheInitParams",
        ("disable", "req_to_token_pool", "token_to_kv_pool_allocator", "page_size", "tree_components"),
    ),
    Use(f"{SRT}.mem_cache.unified_cache.components.ComponentType", ("FULL",)),
    Use(f"{SRT}.utils.get_available_gpu_memory", ("device", "gpu_id", "distributed", "cpu_group")),
)

# prm/engine.py: one forward pass
PRM_PASS = (
    Use(
        f"{BATCH}.ScheduleBatch.init_new",
        (
            *("reqs", "req_to_token_pool", "token_to_kv_pool_allocator", "tree_cache", "model_config"),
            *("enable_overlap", "spec_algorithm"),
        ),
    ),
    Use(f"{BATCH}.ScheduleBatch.prepare_for_extend"),
    Use(f"{BATCH}.ScheduleBatch", ("extend_lens",)),
    Use(f"{SRT}.managers.overlap_utils.resolve_forward_inputs", ("batch", "future_map")),
    Use(
        f"{SRT}.model_executor.forward_batch_info.ForwardBatch.init_new",
        ("batch", "model_runner", "return_hidden_states_before_norm", "capture_hidden_mode"),
    ),
    Use(f"{SRT}.model_executor.forward_batch_info.CaptureHiddenMode", ("FULL",)),
    Use(f"{SRT}.model_executor.model_runner.ModelRunner.forward", ("forward_batch",)),
    Use(f"{SRT}.model_executor.model_runner.ModelRunnerOutput", ("logits_output",)),
    Use(f"{SRT}.layers.logits_processor.LogitsProcessorOutput", ("hidden_states",)),
    Use(f"{SRT}.speculative.spec_info.SpeculativeAlgorithm", ("NONE",)),
    Use(f"{SRT}.mem_cache.common.release_kv_cache", ("req", "tree_cache", "checkpoint")),
    Use(f"{BATCH}.Req._compute_max_prefix_len", ("input_len",)),
    Use(f"{BATCH}.Req.init_next_round_input", ("tree_cache",)),
    Use(
        f"{BATCH}.Req",
        ("finished_len", "last_node", "prefix_len", "lock", "extend_end", "full_untruncated_fill_ids"),
    ),
    Use(f"{SRT}.sampling.sampling_params.SamplingParams.normalize", ("tokenizer",)),
    Use(f"{SRT}.mem_cache.memory_pool.ReqToTokenPool.available_size"),
    Use(f"{SRT}.utils.broadcast_pyobj", ("data", "rank", "dist_group", "src")),
    Use(f"{SRT}.distributed.parallel_state.GroupCoordinator.all_gather", ("input_", "dim")),
    Use(f"{SRT}.distributed.parallel_state.GroupCoordinator.all_reduce", ("input_",)),
    Use(f"{SRT}.layers.vocab_parallel_embedding.VocabParallelEmbedding", ("shard_indices",)),
    Use(
        f"{SRT}.layers.vocab_parallel_embedding.VocabParallelEmbeddingShardIndices",
        ("org_vocab_start_index", "org_vocab_end_index"),
    ),
)

# api/serving.py
SERVING = (
    Use(OPENAI_BASE, ("tokenizer_manager",)),
    Use(f"{OPENAI_BASE}._validate_request", ("_",)),
    Use(f"{OPENAI_BASE}._convert_to_internal_request", ("request", "raw_request")),
    Use(f"{OPENAI_BASE}._resolve_lora_path", ("request_model", "explicit_lora_path")),
    Use(TOKENIZER_MANAGER, ("server_args", "context_len")),
    Use(f"{TOKENIZER_MANAGER}.create_abort_task", ("obj",)),
    Use(f"{TOKENIZER_MANAGER}.generate_request", ("obj", "request")),
    Use(f"{TOKENIZER_MANAGER}.abort_request", ("rid",)),
    Use(f"{SRT}.managers.io_struct.GenerateReqInput", ("sampling_params", "stream", "rid")),
)

# api/native.py
NATIVE = (
    Use(
        f"{SRT}.managers.io_struct.GenerateReqInput",
        (
            "sampling_params",
            "text",
            "input_ids",
            "input_embeds",
            "session_params",
            "contains_mm_input",
            "top_logprobs_num",
            "rid",
            "is_single",
        ),
    ),
    Use(f"{SRT}.managers.io_struct.AbortReq", ("rid",)),
    Use(f"{SRT}.managers.io_struct.FlushCacheReqOutput", ("success",)),
    Use(TOKENIZER_MANAGER, ("server_args", "model_config", "rid_to_state", "is_pause", "event_loop")),
    Use(f"{FIELDS}.exec_.ExecFeatures", ("enable_memory_saver",)),
    Use(f"{TOKENIZER_MANAGER}.flush_cache", ("timeout_s",)),
    Use(f"{TOKENIZER_MANAGER}._dispatch_to_scheduler", ("obj",)),
    Use(f"{SRT}.configs.model_config.ModelConfig", ("vocab_size",)),
)

# engine/tree_plan.py and engine/tree_attention.py
TRITON_BACKEND = f"{SRT}.layers.attention.triton_backend.TritonAttnBackend"
FORWARD_BATCH = f"{SRT}.model_executor.forward_batch_info.ForwardBatch"
DECODE_KERNELS = "sglang.kernels.ops.attention.decode_attention"
FIRST_STAGE = (
    *("q", "k_buffer", "v_buffer", "att_out", "att_lse", "kv_indptr", "kv_indices", "num_kv_splits", "max_kv_splits"),
    *("sm_scale_withk", "logit_cap", "page_size"),
)
TREE_ATTENTION = (
    Use(SCHEDULER, ("tp_worker", "tree_cache")),
    Use(f"{BATCH}.NextBatchPlan", ("batch_to_run",)),
    Use(f"{BATCH}.ScheduleBatch", ("reqs", "forward_mode")),
    Use(f"{BATCH}.Req", ("rid", "last_node")),
    Use(f"{TREE_CORE}.UnifiedTreeCoreInterface.collect_path_info", ("end_node_ids",)),
    Use(f"{TREE_CORE}.TreePathNodeInfo", ("node_id", "path_start", "path_end")),
    Use(f"{SRT}.model_executor.model_runner.ModelRunner", ("attn_backend", "req_to_token_pool", "dtype")),
    Use(f"{TRITON_BACKEND}.__init__", ("model_runner",)),
    Use(f"{TRITON_BACKEND}.init_forward_metadata", ("forward_batch",)),
    Use(f"{TRITON_BACKEND}.init_forward_metadata_out_graph", ("forward_batch", "in_capture")),
    Use(f"{TRITON_BACKEND}.init_cuda_graph_state", ("max_bs", "max_num_tokens")),
    Use(f"{TRITON_BACKEND}.get_num_kv_splits", ("num_kv_splits", "seq_lens")),
    Use(f"{TRITON_BACKEND}.shared_read_ends", ("fm",)),
    Use(f"{SRT}.layers.attention.base_attn_backend.SharedReadEnds", ("POST_REPLAY",)),
    Use(
        TRITON_BACKEND,
        (
            *("decode_attention_fwd", "forward_metadata", "num_head", "num_kv_head", "v_head_dim", "max_kv_splits"),
            *("max_context_len", "page_size", "req_to_token", "kv_index_translator", "cuda_graph_kv_indices"),
            *("use_mla", "dcp_size", "device", "token_to_kv_pool"),
        ),
    ),
    Use(f"{DECODE_KERNELS}._decode_att_m_fwd", FIRST_STAGE),
    Use(f"{DECODE_KERNELS}._decode_grouped_att_m_fwd", FIRST_STAGE),
    Use(
        f"{DECODE_KERNELS}.decode_attention_fwd",
        (
            *("q", "k_buffer", "v_buffer", "o", "kv_indptr", "kv_indices", "attn_logits", "attn_lse"),
            *("num_kv_splits", "max_kv_splits", "sm_scale", "k_scale", "v_scale"),
            *("logit_cap", "sinks", "xai_temperature_len", "score_mod"),
        ),
    ),
    Use(
        f"{SRT}.mem_cache.kv_index_translator.KVIndexTranslator.pack_read_stream",
        ("plan", "req_pool_indices", "seq_lens", "indptr", "out", "kv_start_idx"),
    ),
    Use(f"{SRT}.mem_cache.kv_index_translator.KVIndexTranslator", ("reads_are_translated",)),
    Use(
        FORWARD_BATCH,
        (
            *("rids", "batch_size", "req_pool_indices", "seq_lens", "seq_lens_sum", "forward_mode", "spec_info"),
            "kv_loc_plan",
        ),
    ),
    *FORWARD_STREAM,
)
