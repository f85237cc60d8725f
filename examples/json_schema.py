"""Free thinking, then an answer that a schema describes. Needs `pip install 'moejet[grammar]'`.

The embedded reasoner has never seen JSON: its thinking is right, the number that it writes in there need not be.
"""

import json

from moejet import LLM, Grammar, SamplingParams

schema = {
    "type": "object",
    "properties": {"says": {"type": "string", "pattern": "^The answer is [0-9]{1,3}\\.$"}},
    "required": ["says"],
    "additionalProperties": False,
}
with LLM() as llm:
    params = SamplingParams(temperature=0, max_tokens=200, grammar=Grammar.json_schema(schema))
    [result] = llm.chat([{"role": "user", "content": "Start with 17, add 25."}], params)

print(result.outputs[0].reasoning)
print(json.loads(result.outputs[0].content))
