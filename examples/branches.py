"""A search of one's own: branches share what they have in common and go on together, each until its own condition."""

from moejet import LLM, SamplingParams

question = [{"role": "user", "content": "Start with 17, add 25, then multiply by 3."}]
with LLM() as llm, llm.branch(question) as root:
    beams = [root]
    for _ in range(3):  # lines of thinking
        forks = [fork for beam in beams for fork in beam.fork(4)]
        llm.advance(forks, until="\n", max_tokens=60, params=SamplingParams(seed=1))
        beams = sorted(forks, key=lambda fork: fork.score, reverse=True)[:2]
    beams[0].advance(params=SamplingParams(temperature=0))
    print(beams[0].text)
    counters = llm.counters()
    print(f"{counters['generated_tokens']} tokens in {counters['steps']} steps")
