"""Toy language models shared by several test folders; and what is skipped where a package is absent."""

import os
import resource
import shutil
import signal
from contextlib import contextmanager
from importlib.util import find_spec

import pytest

_PACKAGES = (
    "boto3",
    "jsonschema",
    "kfp",
    "kubeflow",
    "mkdocs",
    "mlflow",
    "moto",
    "playwright",
    "trl",
    "werkzeug",
)
ABSENT = {name for name in _PACKAGES if not find_spec(name)}
"""Packages that `make setup` installs, and that are not here: tests that import one are skipped."""
FOLDERS = {"docs": "mkdocs", "pipelines": "kfp", "registry": "mlflow", "tracking_stack": "moto"}
"""Where tests start programs that import these."""


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_NO_CHROMIUM = "there is no Chromium here, in which the pages are tested; install one (Debian: chromium)"


def pytest_configure():
    if not CHROMIUM and os.environ.get("BROWSER_TESTS"):
        raise pytest.UsageError(_NO_CHROMIUM)
    if ABSENT and os.environ.get("ALL_TESTS"):
        raise pytest.UsageError(
            f"{', '.join(sorted(ABSENT))} not installed, whose tests would be skipped; make setup"
        )


@contextmanager
def skipping_what_is_absent():
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause:
            name = (getattr(cause, "name", "") or "").partition(".")[0]
            if isinstance(cause, ModuleNotFoundError) and name in ABSENT:
                skip_without(name)
            cause = cause.__cause__ or cause.__context__
        raise


def skip_without(package):
    pytest.skip(f"{package} is not installed here; make setup installs it", allow_module_level=True)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    collect = collector.collect

    def collect_or_skip():
        package = FOLDERS.get(collector.path.parent.name)
        if isinstance(collector, pytest.Module) and package in ABSENT:
            skip_without(package)
        with skipping_what_is_absent():
            return list(collect())

    collector.collect = collect_or_skip
    return (yield)


# What takes longest is begun first, so that all workers end together. (pytest drops the order of paths on its
# command line where one lies within another.)
LONGEST = (
    "test_story_world.py", "distributed/test_sharding.py", "pipelines/test_runs.py",
    "distributed/test_processes.py", "distributed/test_cluster.py", "docs/test_examples.py",
    "benchmarks/test_benchmarks.py", "tracking_stack/", "tracking/test_tracker.py", "spo/test_resume.py",
    "lm/test_tokenizing.py", "registry/test_serving.py", "sft/", "pipelines/", "spo/", "evaluation/",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.nodeid.removeprefix("tests/")
        return next((i for i, start in enumerate(LONGEST) if name.startswith(start)), len(LONGEST))

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup():
    with skipping_what_is_absent():
        return (yield)


pytest_runtest_call = pytest_runtest_setup


@pytest.fixture(scope="session")
def make_tokenizer():
    return _make_tokenizer


@pytest.fixture(scope="session")
def make_model():
    return _make_model


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}: {{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


def _make_tokenizer(
    letters="abcdefghijklmnopqrstuvwxyz .,:?\n",
    *,
    start=True,
    closes=False,
    pad_is_eos=False,
    eos="<|im_end|>",
    chat_template=CHAT_TEMPLATE,
):
    """A tokenizer with a token per letter; `start` puts BOS before a text, `closes` puts EOS after it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    text = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    text.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    text.decoder = decoders.Fuse()
    pattern = ("<s> " if start else "") + "$A" + (f" {eos}" if closes else "")
    text.post_processor = processors.TemplateProcessing(
        single=pattern, special_tokens=[("<s>", 1), (eos, vocabulary[eos])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text,
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        pad_token=eos if pad_is_eos else "<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def _make_model(tokenizer, *, seed=0, width=16, layers=1, spread=0.5, **options):
    """A small Llama whose next-token odds are far from uniform (`spread` is the scale of its weights)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=spread,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where downloads are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "softpref"


@pytest.fixture(scope="session")
def browser():
    """A Chromium of this machine, without a window."""
    from playwright.sync_api import sync_playwright

    if not CHROMIUM:
        pytest.skip(_NO_CHROMIUM)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM)
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def s3_server():
    """An S3 store: its address and the login of a user who may do everything in it."""
    import json

    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    anyone = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
    users = boto3.client("iam", endpoint_url=f"http://{host}:{port}", **anyone)
    users.create_user(UserName="team")
    policy = {"Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}], "Version": "2012-10-17"}
    users.put_user_policy(UserName="team", PolicyName="all", PolicyDocument=json.dumps(policy))
    login = users.create_access_key(UserName="team")["AccessKey"]
    yield f"http://{host}:{port}", login["AccessKeyId"], login["SecretAccessKey"]
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch, cache):
    """A client with the bucket `team` in the store, which the environment points to; logins are checked."""
    import boto3
    import moto.settings

    address, key, secret = s3_server
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
    for variable in ("AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="team")
    yield client
    for stored in client.list_objects_v2(Bucket="team").get("Contents", []):
        client.delete_object(Bucket="team", Key=stored["Key"])
    client.delete_bucket(Bucket="team")


@pytest.fixture
def memory():
    """The store behind `memory://`, empty before and after."""
    import fsspec

    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A SQLite store with its tables made, to be copied: making them takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_registered_models()
    return path


@pytest.fixture
def store(tmp_path, empty_store):
    """The address of an empty store of this test."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def client(store):
    """Of the test's store."""
    from mlflow import MlflowClient

    return MlflowClient(store)


@pytest.fixture
def file_limit():
    """`file_limit(bytes)`: no file of this process may grow larger, as on a disk that becomes full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, former)
