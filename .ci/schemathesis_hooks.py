"What the API's document cannot say of a question, for schemathesis: its titles differ, and are more than markup"
import schemathesis

from corrnb.data import text_key


def mended(contract, number: int, seen: set):
    "The contract with another title where its own is nothing but markup, or there already"
    title = contract.get('title') if isinstance(contract, dict) else contract
    if not isinstance(title, str): return contract
    key = text_key(title)
    if title.strip() and (not key or key in seen): title = f'title {number}'
    seen.add(text_key(title))
    return contract | {'title': title} if isinstance(contract, dict) else title

def mend(question):
    "A question whose contracts differ; of anything else nothing changes"
    if not isinstance(question, dict): return question
    if isinstance(question.get('pairs'), list): return question | {'pairs': [*map(mend, question['pairs'])]}
    seen, names = set(), [n for n in ('contract', 'contract_a', 'contract_b') if n in question]
    found = {n: mended(question[n], i, seen) for i, n in enumerate(names)}
    if isinstance(question.get('contracts'), list):
        found['contracts'] = [mended(c, i, seen) for i, c in enumerate(question['contracts'])]
    return question | found

@schemathesis.hook
def before_call(context, case, kwargs):
    "Each question is sent mended, whatever phase made it"
    if isinstance(case.body, dict): case.body = mend(case.body)
