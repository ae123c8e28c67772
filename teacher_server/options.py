"""Command line of `teacher-server`, and every check that needs neither torch nor the weights.

Nothing heavy is imported here: `--help` and a wrong option answer at once.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import re
import socket
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_server.start_failures import StartError

DTYPES = ("auto", "float32", "bfloat16", "float16")
ENGINES = ("torch", "vllm")
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
USAGE = "teacher-server --model DIR [options]"
LEADER_PORT = 29400
MAX_RESPONSE_BYTES = 255 * 2**20
"""What a client's receive limit of 256 MiB leaves for the arrays of an answer."""


class OptionError(StartError, ValueError):
    """An option, or a file that it names, is wrong; the message names option, value and fix."""

    exit_code = 2

    def __init__(self, message: str, reason: str = "options") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Options:
    """What the operator asked for."""

    engine: str
    model: Path
    name: str
    revision: str  # "": digest of the files
    expect_revision: str  # lower case; "": whatever the files are
    listen: str
    metrics_port: int
    dtype: str
    device: str
    vocabulary_size: int | None
    max_sequence_tokens: int | None
    max_top_k: int
    max_candidates: int
    max_batch_tokens: int
    max_queue_tokens: int
    max_queue_bytes: int
    burst_tokens: int | None  # None: 16 batches
    max_response_bytes: int
    logits_slice_bytes: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    nodes: int
    node_rank: int
    leader_address: str
    nodes_wait_s: float
    quantization: str | None
    gpu_memory_utilization: float | None
    kv_cache_bytes: int | None
    prefix_caching: bool
    vllm_options: dict[str, Any]
    tls_certificate: Path | None
    tls_key: Path | None
    tls_client_ca: Path | None
    access: Path | None
    plaintext_tokens: bool
    token_review: bool
    token_audience: str
    token_review_url: str
    token_review_credentials: Path
    health_listen: str
    follow: bool
    drain_s: float
    stall_s: float
    hold_failed_s: float
    log_level: str
    log_format: str

    @property
    def host(self) -> str:
        """Host part of `listen`, without the brackets of an IPv6 address."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Port part of `listen`."""
        return int(self.listen.rpartition(":")[2])

    @property
    def leader(self) -> tuple[str, int]:
        """Host and port of `leader_address`. Raises ValueError."""
        parts = urllib.parse.urlsplit(f"//{self.leader_address}")
        if not parts.hostname or parts.netloc != self.leader_address:
            raise ValueError(self.leader_address)
        return parts.hostname, LEADER_PORT if parts.port is None else parts.port


def server_version() -> str:
    """Version of the installed distribution, or "source" when it runs from a checkout."""
    try:
        return importlib.metadata.version("stillhouse")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def parse(argv: Sequence[str] | None = None) -> Options:
    """The options of a command line, not yet checked. What is none ends the program with code 2 and one message."""
    arguments = vars(build_parser().parse_args(argv))
    arguments["name"] = arguments["name"] or arguments["model"].resolve().name
    arguments["expect_revision"] = arguments["expect_revision"].lower()
    arguments["prefix_caching"] = not arguments.pop("no_prefix_caching")
    return Options(**arguments)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error}); give an object") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object; give {{'name': value}} in JSON")
    return value


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def choose(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(choices)}")
        return text

    return choose


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of an option that has one and whose help does not explain it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", False, argparse.SUPPRESS) or action.default == {}:
            return action.help
        return super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The parser; its help is the reference of the options."""
    parser = argparse.ArgumentParser(
        prog="teacher-server",
        usage=USAGE,
        description="Serves one causal language model as a teacher: scores token sequences over gRPC.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"teacher-server {server_version()}")

    add = parser.add_argument_group("what is served").add_argument
    add("--engine", default="torch", help="what computes the scores: torch or vllm")
    add("--model", type=Path, required=True, metavar="DIR", help="Hugging Face directory with safetensors")
    add("--name", default="", help="model name in requests (default: the directory's name)")
    add("--revision", default="", help="revision to announce (default: SHA-256 of configuration and weights)")
    add(
        "--expect-revision",
        default="",
        metavar="SHA256",
        help="serve only if this is the SHA-256 of configuration and weights, as a server announces it by default",
    )
    add("--dtype", default="auto", help=f"{', '.join(DTYPES)}; auto: as stored on a GPU, float32 on a CPU")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto: cuda if there is one")
    add("--vocabulary-size", type=int, metavar="N", help="ids that exist (default: the tokenizer's)")

    add = parser.add_argument_group("where").add_argument
    add("--listen", default="127.0.0.1:50051", metavar="HOST:PORT", help="port 0 picks a free one")
    add("--metrics-port", type=int, default=9464, metavar="PORT", help="Prometheus, on the same host; 0 picks")

    add = parser.add_argument_group("limits").add_argument
    add("--max-sequence-tokens", type=int, metavar="N", help="longest sequence (default: the model's longest)")
    add("--max-top-k", type=int, default=256, metavar="N", help="largest top_k")
    add("--max-candidates", type=int, default=256, metavar="N", help="most candidates a position")
    add("--max-batch-tokens", type=int, default=8192, metavar="N", help="tokens of a batch, with padding")
    add("--max-queue-tokens", type=int, default=2**20, metavar="N", help="tokens admitted and not yet scored")
    add("--max-queue-bytes", type=int, default=2**31, metavar="N", help="the same in bytes, with the answers to come")
    add(
        "--burst-tokens",
        type=int,
        metavar="N",
        help="how much a tenant that was quiet may be served ahead of its share (default: 16 x --max-batch-tokens)",
    )
    add("--max-response-bytes", type=int, default=128 * 2**20, metavar="N", help="largest answer, bytes")
    add(
        "--logits-slice-bytes",
        type=int,
        default=256 * 2**20,
        metavar="N",
        help="float32 logits held at once, bytes; about three times as much is in use at the peak",
    )

    add = parser.add_argument_group("vllm engine", "with --engine vllm only").add_argument
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="devices that share each layer")
    add("--pipeline-parallel-size", type=int, default=1, metavar="N", help="groups of devices that share the layers")
    add("--nodes", type=int, default=1, metavar="N", help="machines that share the model, each with as many devices")
    add("--node-rank", type=int, default=0, metavar="R", help="which of them this is; 0 leads, and alone serves")
    add("--leader-address", default="", metavar="HOST[:PORT]", help=f"of node 0 (default port: {LEADER_PORT})")
    add(
        "--nodes-wait-s", type=float, default=600.0, metavar="S", help="how long the nodes wait for each other, seconds"
    )
    add("--quantization", metavar="METHOD", help="as vLLM names it (default: what the model's configuration says)")
    add(
        "--gpu-memory-utilization",
        type=float,
        metavar="SHARE",
        help="share of a device's memory for weights, cache and all else, 0 .. 1 (default: vLLM's)",
    )
    add(
        "--kv-cache-bytes",
        type=int,
        metavar="N",
        help="size of the KV cache of a process (default: what the share above leaves; on a CPU 2 GiB)",
    )
    add("--no-prefix-caching", action="store_true", help="compute every prompt anew")
    add(
        "--vllm-options",
        type=_json_object,
        default={},
        metavar="JSON",
        help="any other engine argument of vLLM, for example '{\"max_num_seqs\": 64}'",
    )

    add = parser.add_argument_group("who may use it", "see docs/access.md; without --access everybody").add_argument
    add("--access", type=Path, metavar="FILE", help="YAML: tenants, their models, quotas and credentials")
    add("--tls-certificate", type=Path, metavar="FILE", help="PEM, the server's certificate and those above it")
    add("--tls-key", type=Path, metavar="FILE", help="PEM, its private key")
    add("--tls-client-ca", type=Path, metavar="FILE", help="PEM; clients must show a certificate of this authority")
    add("--plaintext-tokens", action="store_true", help="take tokens without TLS: something before it encrypts")
    add("--token-review", action="store_true", help="ask Kubernetes about tokens that --access has no hash of")
    add("--token-audience", default="stillhouse", metavar="NAME", help="what such a token must be made for")
    add(
        "--token-review-url",
        default="https://kubernetes.default.svc",
        metavar="URL",
        help="the Kubernetes API",
    )
    add(
        "--token-review-credentials",
        type=Path,
        default=Path("/var/run/secrets/kubernetes.io/serviceaccount"),
        metavar="DIR",
        help="holds `token` and `ca.crt`: by what the server itself may ask it",
    )

    add = parser.add_argument_group("running").add_argument
    add(
        "--health-listen",
        default="",
        metavar="HOST:PORT",
        help="grpc.health.v1 in plaintext, from before the model is loaded: readiness, and the service `liveness`",
    )
    add(
        "--follow",
        action="store_true",
        help="--model is a link: when it points elsewhere, load that, check it, switch, drain (SIGHUP: now)",
    )
    add(
        "--drain-s",
        type=float,
        default=30.0,
        metavar="S",
        help="time for admitted work after SIGTERM, seconds",
    )
    add(
        "--stall-s",
        type=float,
        default=300.0,
        metavar="S",
        help="an engine with work that ends none for so long is neither ready nor alive, seconds",
    )
    add(
        "--hold-failed-s",
        type=float,
        default=0.0,
        metavar="S",
        help="a start that failed stays so long before it ends, not ready, so that its metrics are read, seconds",
    )
    # Refused by argparse: everything after this is logged.
    add("--log-level", default="info", type=_one_of(LOG_LEVELS), help=", ".join(LOG_LEVELS))
    add("--log-format", default="text", type=_one_of(LOG_FORMATS), help=", ".join(LOG_FORMATS))
    return parser


def check(options: Options) -> None:
    """Raises OptionError for what can be seen to be wrong without loading anything."""
    _check_choice("--engine", options.engine, ENGINES)
    _check_choice("--dtype", options.dtype, DTYPES)
    _check_model_directory(options.model)
    if not options.name or any(character.isspace() for character in options.name):
        raise OptionError(f"--name {options.name!r}: give a name without white space")
    if len((options.name + options.revision).encode()) > 190:  # answers repeat both
        raise OptionError(f"--name {options.name} --revision {options.revision}: give at most 190 bytes together")
    for option, value, smallest in (
        ("--vocabulary-size", options.vocabulary_size, 1),
        ("--max-sequence-tokens", options.max_sequence_tokens, 2),
        ("--max-top-k", options.max_top_k, 0),
        ("--max-candidates", options.max_candidates, 0),
        ("--max-batch-tokens", options.max_batch_tokens, 1),
        ("--max-queue-tokens", options.max_queue_tokens, 1),
        ("--max-queue-bytes", options.max_queue_bytes, 1),
        ("--burst-tokens", options.burst_tokens, 0),
        ("--logits-slice-bytes", options.logits_slice_bytes, 1),
        ("--tensor-parallel-size", options.tensor_parallel_size, 1),
        ("--pipeline-parallel-size", options.pipeline_parallel_size, 1),
        ("--nodes", options.nodes, 1),
        ("--kv-cache-bytes", options.kv_cache_bytes, 1),
    ):
        if value is not None and value < smallest:
            raise OptionError(f"{option} {value}: give {smallest} or more")
    _check_vllm_options(options)
    if not 1 <= options.max_response_bytes <= MAX_RESPONSE_BYTES:
        raise OptionError(
            f"--max-response-bytes {options.max_response_bytes}: give 1 .. {MAX_RESPONSE_BYTES}, "
            "the most that clients receive"
        )
    if not 0 <= options.drain_s <= 86_400:
        raise OptionError(f"--drain-s {options.drain_s}: give 0 .. 86400 seconds")
    if not 1 <= options.stall_s <= 86_400:
        raise OptionError(f"--stall-s {options.stall_s}: give 1 .. 86400 seconds")
    if not 0 <= options.hold_failed_s <= 86_400:
        raise OptionError(f"--hold-failed-s {options.hold_failed_s}: give 0 .. 86400 seconds")
    _check_expected_revision(options)
    _check_security(options)
    _check_addresses(options)


def _check_expected_revision(options: Options) -> None:
    expected = options.expect_revision
    if not expected:
        return
    if not re.fullmatch("[0-9a-f]{64}", expected):
        raise OptionError(f"--expect-revision {expected!r}: give 64 hexadecimal digits, as a server announces them")
    if options.revision:
        raise OptionError(f"--expect-revision {expected}: --revision leaves the digest out; give one of them")
    if options.follow:
        raise OptionError(f"--expect-revision {expected}: --follow would refuse every other model; give one of them")


def _check_security(options: Options) -> None:
    """Combinations that would leave a door open that somebody thinks is closed."""
    if (options.tls_certificate is None) != (options.tls_key is None):
        given, missing = ("--tls-certificate", "--tls-key")
        if options.tls_certificate is None:
            given, missing = missing, given
        raise OptionError(f"{given} {options.tls_certificate or options.tls_key}: give {missing} too")
    if options.tls_client_ca is not None and options.tls_certificate is None:
        raise OptionError(f"--tls-client-ca {options.tls_client_ca}: give --tls-certificate and --tls-key too")
    if options.tls_client_ca is not None and options.access is None:
        raise OptionError(
            f"--tls-client-ca {options.tls_client_ca}: give --access too, which says what the callers may use"
        )
    if options.token_review and options.access is None:
        raise OptionError("--token-review: give --access too, which says what the service accounts may use")
    if options.access is not None and options.tls_certificate is None and not options.plaintext_tokens:
        raise OptionError(
            f"--access {options.access}: without TLS anybody on the way can read the tokens; give --tls-certificate "
            "and --tls-key, or --plaintext-tokens if a proxy or mesh before the server encrypts"
        )


def _check_vllm_options(options: Options) -> None:
    share = options.gpu_memory_utilization
    if share is not None and not 0 < share <= 1:
        raise OptionError(f"--gpu-memory-utilization {share}: give a share above 0 and up to 1")
    if options.engine == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise OptionError("--engine vllm: vllm is not installed; pip install 'stillhouse[vllm]'")
        _check_nodes(options)
        return
    for option, value, given in (
        ("--tensor-parallel-size", options.tensor_parallel_size, options.tensor_parallel_size != 1),
        ("--pipeline-parallel-size", options.pipeline_parallel_size, options.pipeline_parallel_size != 1),
        ("--nodes", options.nodes, options.nodes != 1),
        ("--node-rank", options.node_rank, options.node_rank != 0),
        ("--leader-address", options.leader_address, options.leader_address != ""),
        ("--quantization", options.quantization, options.quantization is not None),
        ("--gpu-memory-utilization", share, share is not None),
        ("--kv-cache-bytes", options.kv_cache_bytes, options.kv_cache_bytes is not None),
        ("--no-prefix-caching", "", not options.prefix_caching),
        ("--vllm-options", json.dumps(options.vllm_options), bool(options.vllm_options)),
    ):
        if given:
            raise OptionError(f"{option} {value}: the {options.engine} engine has no such option; add --engine vllm")


def _check_nodes(options: Options) -> None:
    nodes, rank, address = options.nodes, options.node_rank, options.leader_address
    if not 0 <= rank < nodes:
        raise OptionError(f"--node-rank {rank}: with --nodes {nodes} the ranks are 0 .. {nodes - 1}")
    if nodes == 1:
        if address:
            raise OptionError(f"--leader-address {address}: give --nodes and --node-rank too")
        return
    try:
        _, port = options.leader
    except ValueError:
        port = 0
    if not port:
        raise OptionError(f"--leader-address {address!r}: with --nodes {nodes} give HOST or HOST:PORT of node 0")
    tensor, pipeline = options.tensor_parallel_size, options.pipeline_parallel_size
    if tensor * pipeline % nodes:
        raise OptionError(
            f"--nodes {nodes}: --tensor-parallel-size {tensor} times --pipeline-parallel-size {pipeline} devices are "
            f"no multiple of {nodes}; give each node as many"
        )
    if not 1 <= options.nodes_wait_s <= 86_400:
        raise OptionError(f"--nodes-wait-s {options.nodes_wait_s}: give 1 .. 86400 seconds")
    if options.follow:
        raise OptionError(f"--follow: a teacher on {nodes} nodes is given other weights by starting it anew")


def _check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise OptionError(f"{option} {value!r}: choose from {', '.join(choices)}")


def _check_model_directory(model: Path) -> None:
    if not model.is_dir():
        raise OptionError(f"--model {model}: no such directory; give a Hugging Face model directory", "model")
    config = model / "config.json"
    if not config.is_file():
        raise OptionError(
            f"--model {model}: it has no config.json; give the directory that save_pretrained wrote", "model"
        )
    try:
        is_object = isinstance(json.loads(config.read_text()), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise OptionError(f"--model {model}: its config.json is not a JSON object; save or download it again", "model")
    if not any(model.glob("*.safetensors")):
        raise OptionError(
            f"--model {model}: it has no *.safetensors file; save the model with save_pretrained", "model"
        )


def _check_addresses(options: Options) -> None:
    host, separator, port = options.listen.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65_535:
        raise OptionError(f"--listen {options.listen!r}: give HOST:PORT, for example 127.0.0.1:50051")
    if not 0 <= options.metrics_port <= 65_535:
        raise OptionError(f"--metrics-port {options.metrics_port}: give 0 .. 65535")
    if options.metrics_port == options.port != 0:
        raise OptionError(f"--metrics-port {options.metrics_port}: --listen has this port; give another")
    ports = [
        ("--listen", options.listen, options.host, options.port),
        ("--metrics-port", options.metrics_port, options.host, options.metrics_port),
    ]
    if options.health_listen:
        health_host, separator, health_port = options.health_listen.rpartition(":")
        if not separator or not health_host or not health_port.isdigit() or int(health_port) > 65_535:
            raise OptionError(f"--health-listen {options.health_listen!r}: give HOST:PORT, for example 0.0.0.0:8080")
        if int(health_port) in (options.port, options.metrics_port) and int(health_port):
            raise OptionError(f"--health-listen {options.health_listen}: this port has another use; give another")
        ports.append(("--health-listen", options.health_listen, health_host.strip("[]"), int(health_port)))
    for option, value, host, number in ports:
        # Binding and letting go again: minutes of loading should not end at a port that is taken.
        try:
            family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen(1)
        except OSError as error:
            raise OptionError(f"{option} {value}: cannot listen there ({error}); give a free port") from None
