"""`mmchat serve`: OpenAI's and Ollama's APIs, and a page, in front of one engine.

A request goes through `checks` (who may ask), `call` (its body and its life), the module of its API
(its form), `prompts` (the one internal request of all of them), and `ask` (the engine).
"""
