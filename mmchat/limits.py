"""Every cap on input from outside, in one table. Sizes are bytes unless the name says otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping

KIB, MIB = 1024, 1024**2

# Address space (ulimit -v) without which an import of torch crashes the process
TORCH_ADDRESS_BYTES = 800 * MIB

# Pictures
IMAGE_BYTES = 64 * MIB
IMAGE_PIXELS = 64 * MIB  # decoded pixels; the model uses 1.25 million at most
WEBP_PIXELS = 48 * MIB  # its decoder takes 16 bytes a pixel of DECODE_MEMORY_BYTES
IMAGE_SIDE_PIXELS = 65_535  # the JPEG maximum
IMAGES_PER_PROMPT = 16
MOST_ROWS = 64  # conversations that are answered at once
IMAGES_PIXELS = 256 * MIB  # of all pictures of a prompt or chat; 16 of 12 million fit
IMAGES_BYTES = IMAGES_PER_PROMPT * IMAGE_BYTES  # of their files, which wait to be decoded

# Parts of a picture file, counted before it is decoded
JPEG_SCANS = 100  # a progressive JPEG has about 10; each goes over all pixels
JPEG_SEGMENTS = 2_048
JPEG_GAP_KIB = 64  # of fill bytes and of what is no segment, which Pillow reads byte by byte
JPEG_EXIF_SEGMENTS = 16
PNG_CHUNKS = 65_536  # encoders write data in chunks of 8 KiB
GIF_BLOCKS = 65_536
GIF_COMMENT_BLOCKS = 1_024
TIFF_PAGES = 10_000  # counted; what follows is not

# Documents, whose pages are pictures
DOCUMENT_PAGES = IMAGES_PER_PROMPT  # that are taken of one
PDF_PAGE_POINTS = 14_400  # a side, of 1/72 inch; the format's own limit
PDF_DOTS_PER_INCH = 200  # that a page is drawn with,
PDF_SIDE_PIXELS = 2_240  # and how long its longer side becomes at most

# The process that decodes pictures
DECODE_CPU_SECONDS = 10.0  # for one picture
DECODE_WALL_SECONDS = 60.0  # for one picture, on a machine that is busy
DECODE_MEMORY_BYTES = 1024 * MIB  # address space
DECODE_WORKERS = 1

# Remote pictures
URL_LENGTH = 2_048
FETCH_TOTAL_SECONDS = 120.0
FETCH_CONNECT_SECONDS = 10.0
FETCH_IDLE_SECONDS = 30.0
FETCH_REDIRECTS = 20
FETCH_WAIT_SECONDS = 10.0  # that a busy server may ask for

# Text
PROMPT_BYTES = 4 * MIB

# Requests to a server
REQUEST_BYTES = 32 * MIB
LARGE_REQUEST_BYTES = 64 * KIB  # beyond it JSON is parsed in a thread
QUEUED_BYTES = 1024 * MIB  # of all bodies and laid out pictures that wait for a row
REQUEST_MESSAGES = 256
REQUEST_PARTS = 64  # of one message
REQUEST_PICTURES = 8
REQUEST_PROMPTS = 256  # that are continued
REQUEST_SCORES = 1_000_000  # log-probabilities of the tokens of its prompts
REQUEST_HEADERS = 100
REQUEST_HEADER_BYTES = 32 * KIB  # together
HEADER_SECONDS = 10.0  # from the beginning of a connection or request to the end of its headers
BODY_SECONDS = 30.0  # from there to the end of its body, and one more for each MiB
UNREAD_SECONDS = 60.0  # that a client may leave unread what it was sent
CONNECTIONS = 1_024
CONNECTIONS_PER_ADDRESS = 64  # of another machine
SERVER_FETCH_BYTES = 20 * MIB  # a picture that a client names by its address
SERVER_FETCH_SECONDS = 15.0

# Sampling: the least and the greatest value of each setting, in every place where it can be given
SAMPLING: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_k": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "seed": (0, 2**63 - 1),
    "max_new_tokens": (1, math.inf),
    "logprobs": (0, 20),
}

STOP_CHARACTERS = 1_024  # of a stop string, which is indexed before the answer begins

# JSON schemas, which answers are held to; their depth is that of all JSON from outside
SCHEMA_BYTES = 64 * KIB
SCHEMA_SECONDS = 2.0  # to compile one
GRAMMAR_SYMBOLS = 100_000  # of one that is compiled

# Checkpoint files
SAFETENSORS_HEADER_BYTES = 8 * MIB
PTH_PICKLE_BYTES = 16 * MIB
OLLAMA_MODELS = 1_000  # that a list looks at
GGUF_HEADER_BYTES = 32 * MIB  # with a tokenizer inside; that of Llama 3 takes 8
GGUF_KEYS = 1_024
GGUF_STRING_BYTES = 256 * KIB  # a chat template, a licence
GGUF_ARRAY = 1_000_000  # tokens and merges
TENSORS_PER_FILE = 20_000
TENSOR_RANK = 4
TENSOR_NAME_BYTES = 256
ADAPTER_RANK = 8_192  # of a LoRA; a square layer of the 90B has that many rows
CONFIG_JSON_BYTES = 1 * MIB
CONFIG_TOML_BYTES = 64 * 1024
INDEX_JSON_BYTES = 16 * MIB

# Tokenizer files
TOKENIZER_MODEL_BYTES = 16 * MIB
TOKENIZER_JSON_BYTES = 32 * MIB
VOCABULARY_ENTRIES = 300_000
BYTES_PER_TOKEN = 256

# Files that are copied as they are
LICENCE_BYTES = 1 * MIB

# Saved chats
CHAT_JSON_BYTES = 16 * MIB  # without pictures
CHAT_FILE_BYTES = 512 * MIB  # with pictures inside
