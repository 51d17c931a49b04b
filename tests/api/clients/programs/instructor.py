"""instructor: a pydantic model, by tools and by JSON schema."""

import json
import sys

import instructor
from openai import OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="unused", max_retries=0)


class Person(BaseModel):
    name: str
    age: int


def person(mode):
    made = instructor.from_openai(client, mode=mode)
    asked = [{"role": "user", "content": "Name a person."}]
    return made.create(model="tiny", messages=asked, response_model=Person, max_retries=0).model_dump()


print(json.dumps({"parsed": person(instructor.Mode.JSON_SCHEMA), "parsed_by_tools": person(instructor.Mode.TOOLS)}))
