"""Every cap on input from outside, in one table. Sizes are bytes unless the name says otherwise."""

KIB, MIB = 1024, 1024**2

# Address space (ulimit -v) without which an import of torch crashes the process
TORCH_ADDRESS_BYTES = 800 * MIB

# Pictures
IMAGE_BYTES = 64 * MIB
IMAGE_PIXELS = 64 * MIB  # decoded pixels; the model uses 1.25 million at most
IMAGE_SIDE_PIXELS = 65_535  # the JPEG maximum
IMAGES_PER_PROMPT = 16

# Remote pictures
URL_LENGTH = 2_048
FETCH_TOTAL_SECONDS = 30.0
FETCH_CONNECT_SECONDS = 5.0
FETCH_IDLE_SECONDS = 5.0
FETCH_REDIRECTS = 3

# Text
PROMPT_BYTES = 4 * MIB

# Checkpoint files
SAFETENSORS_HEADER_BYTES = 8 * MIB
PTH_PICKLE_BYTES = 16 * MIB
TENSORS_PER_FILE = 20_000
TENSOR_RANK = 4
TENSOR_NAME_BYTES = 256
CONFIG_JSON_BYTES = 1 * MIB
INDEX_JSON_BYTES = 16 * MIB

# Tokenizer files
TOKENIZER_MODEL_BYTES = 16 * MIB
TOKENIZER_JSON_BYTES = 32 * MIB
VOCABULARY_ENTRIES = 300_000
BYTES_PER_TOKEN = 256

# Saved chats
CHAT_JSON_BYTES = 16 * MIB  # without pictures
CHAT_FILE_BYTES = 512 * MIB  # with pictures inside
