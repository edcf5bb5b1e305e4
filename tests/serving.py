"""A real OpenAI-compatible server on loopback: `transformers serve` with a miniature."""

import contextlib
import subprocess
import sys
import time
import urllib.error
import urllib.request

from tests.chats import free_port


@contextlib.contextmanager
def transformers_serve(model, log, timeout_s=120):
    """Start a server for one model in a process of its own; yields its URL."""
    port = free_port()
    entry = "from transformers.cli.transformers import main; main()"
    words = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-c", entry, *words], stdout=out, stderr=subprocess.STDOUT)
        try:
            _await(process, f"http://127.0.0.1:{port}/health", log, timeout_s)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()
            process.wait()


def _await(process, url, log, timeout_s):
    deadline_s = time.monotonic() + timeout_s
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, log.read_text()
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)


def build_text_only(folder):
    """A miniature language model that sees nothing, with a chat template and the miniature's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from pixart_data.miniatures import build_llava

    build_llava(folder.with_name("llava"))
    words = AutoTokenizer.from_pretrained(folder.with_name("llava")).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
