"""An HTTP server in OpenAI's protocol over `jaxlm.decode.Batcher` and `jaxlm.search`.

Needs the extra `serve`. `jaxlm serve` is its command; `docs/serve.md` its page.
"""
