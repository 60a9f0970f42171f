"""Asks `tapioctl mcp` as an assistant's program does, with the protocol's official client. Prints what came, as JSON.

Usage: client.py TAPIOCTL SERVER, and a list of [tool, arguments] on standard input.
"""

import asyncio
import json
import sys

from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client


async def main() -> None:
    program, server = sys.argv[1:3]
    calls = json.load(sys.stdin)
    parameters = StdioServerParameters(command=program, args=["--server", server, "mcp"])
    async with stdio_client(parameters) as (reading, writing), ClientSession(reading, writing) as session:
        begun = await session.initialize()
        tools = (await session.list_tools()).tools
        answers = []
        for tool, arguments in calls:
            answer = (await session.call_tool(tool, arguments)).model_dump(mode="json", by_alias=True)
            text = "".join(part["text"] for part in answer["content"])
            answers.append({"text": text, "is_error": bool(answer.get("isError"))})
    begun = begun.model_dump(mode="json", by_alias=True)
    shown = [tool.model_dump(mode="json", by_alias=True) for tool in tools]
    print(json.dumps({"begun": begun, "tools": shown, "answers": answers}))


asyncio.run(main())
