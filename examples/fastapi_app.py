"""The server inside an application of your own, which loads the model when it starts and closes it when it ends.

Needs `pip install 'moejet[server]'`. `uvicorn --app-dir examples fastapi_app:app` serves it; a script asks itself.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from moejet import AsyncLLM, SamplingParams
from moejet.server import asgi_app


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncLLM() as llm:
        app.state.llm = llm
        app.mount("/llm", asgi_app(llm))  # /llm/v1/chat/completions, the page at /llm/, and so on
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/sum")
async def add(a: int, b: int) -> dict[str, str]:
    """An endpoint of your own over the same engine: requests to both share its steps."""
    question = [{"role": "user", "content": f"Start with {a}, add {b}."}]
    output = await app.state.llm.chat(question, SamplingParams(temperature=0)).result()
    return {"answer": output.outputs[0].content}


if __name__ == "__main__":
    import httpx

    from moejet.server import serve_in_thread

    with serve_in_thread(app) as url:
        print(httpx.get(f"{url}/sum", params={"a": 17, "b": 25}).json())
        print(httpx.get(f"{url}/llm/v1/models").json()["data"][0]["id"])
