"""`mmchat serve`: OpenAI's and Ollama's APIs, and a page, in front of one engine.

A request goes through `checks` (who may ask), `call` (its body and its life), the module of its API
(its form), and `ask` (the one internal request of all of them, and the engine).
"""
