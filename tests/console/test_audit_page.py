"""The Audit page: no action is lost among looks, and the old ones can be reached."""

from .test_console import filled, in_queue


def test_actions_are_found_behind_any_number_of_looks_page_by_page(port, page):
    filled(port)
    for i in range(250):
        port.audit.write("admin", "::1", "POST", f"/act/{i}")
    for i in range(600):
        port.audit.write("admin", "::1", "GET", f"/look/{i}")
    in_queue(port, page)
    page.press("4")
    page.until("document.querySelectorAll('.audit tbody tr').length === 200")
    text = page.text(".audit table")
    assert "/act/249" in text and "/look/" not in text and "/act/49\t" not in text
    page.run("document.querySelector('.foot button').click()")
    page.until("document.querySelector('.foot').innerText.includes('that is all')")
    assert page.count(".audit tbody tr") == 251 and "/act/0" in page.text(".audit table")  # and the signing in
    page.run("document.querySelector('.audit input').click()")
    page.until("document.querySelector('.audit table').innerText.includes('/look/599')")
    assert page.count(".audit tbody tr") == 200
