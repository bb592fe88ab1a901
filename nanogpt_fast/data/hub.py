"""A dataset of the Hugging Face hub as documents, streamed by the datasets library."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

from nanogpt_fast.data.documents import DOWNLOAD_TIMEOUT, Part, too_many_parts
from nanogpt_fast.data.text_files import field_of
from nanogpt_fast.errors import DataError, NanogptError


class HubDocuments:
    """A dataset of the datasets library, streamed: one document in each row's `field`.

    `open_stream` returns the datasets.IterableDataset; it is called when reading starts. `commit` asks the hub at which
    one the dataset is.
    """

    one = False
    nbytes = None

    def __init__(
        self, open_stream: Callable[[], Any], description: str, field: str = "text", commit: Callable[[], str] = str
    ):
        self.open_stream, self.description, self.field, self.commit = open_stream, description, field, commit
        self.fingerprint = description
        self._stream: Any = None

    @property
    def listing(self) -> str:
        with _hub_errors(self.description):
            return f"{self.description} at {self.commit()}"

    def part(self, number: int, of: int) -> "HubDocuments":
        def open_part() -> Any:
            stream = self.open_stream()
            if stream.num_shards < of:
                raise too_many_parts(stream.num_shards, number, of)
            return stream.shard(num_shards=of, index=number - 1)  # contiguous: in the order of the whole

        part = copy.copy(self)
        part.open_stream = open_part
        return part

    def read(self, documents: int = 0, state: Any = None) -> Iterator[Part]:
        with _hub_errors(self.description):
            self._stream = self.open_stream()
            if state is not None:
                self._stream.load_state_dict(state)  # skips whole files, where counting would download them again
            ahead = documents if state is None else 0
            for row, example in enumerate(self._stream, documents - ahead):
                if text := field_of(example, self.field, f"{self.description}, document {row}"):
                    if ahead:
                        ahead -= 1
                    else:
                        yield text, True

    def state(self) -> Any:
        return self._stream.state_dict()


@contextlib.contextmanager
def _hub_errors(where: str) -> Iterator[None]:
    # A stream raises what its HTTP, file system and Arrow layers raise: no common base but Exception.
    try:
        yield
    except NanogptError:
        raise
    except Exception as error:
        raise DataError(
            "the dataset could not be read from the Hugging Face hub",
            where=where,
            found=": ".join([type(error).__name__, *str(error).splitlines()[:1]]),
            hint="check the network and run the same command again (it goes on where it stopped), or give a copy: "
            "--source FOLDER_OF_PARQUET_OR_JSONL",
        ) from error


def libraries() -> Any:
    """(datasets, huggingface_hub). DataError where they are not installed."""
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise DataError("the datasets library is missing", hint="pip install 'nanogpt-fast[data]'") from error
    return datasets, huggingface_hub


def load(repository: str, subset: str, revision: str, split: str, streaming: bool) -> Any:
    """A split of a dataset of the hub, as datasets gives it; raises what its layers raise."""
    datasets, hub = libraries()
    if not hub.constants.HF_HUB_OFFLINE:  # one try: its own take half a minute to say that nobody is there
        hub.get_session().head(hub.constants.ENDPOINT, timeout=DOWNLOAD_TIMEOUT)
    return datasets.load_dataset(
        repository, name=subset or None, revision=revision or None, split=split, streaming=streaming
    )


def hub_documents(repository: str, subset: str, field: str = "text", revision: str = "") -> HubDocuments:
    """The train split of a dataset on the Hugging Face hub, streamed (extra `data`)."""

    def open_stream() -> Any:
        return load(repository, subset, revision, "train", streaming=True)

    def commit() -> str:
        _, hub = libraries()
        if hub.constants.HF_HUB_OFFLINE:
            return "what the cache holds"
        return hub.HfApi().dataset_info(repository, revision=revision or None, timeout=DOWNLOAD_TIMEOUT).sha

    return HubDocuments(open_stream, f"hf:{repository} {subset}".strip(), field, commit)
