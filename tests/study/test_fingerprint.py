from refbn_d2.study.fingerprint import code_hash, normalized

CODE = '''
"""Module."""
def f(x):
    """Doc."""
    return x + 1  # a comment
'''


def test_words_and_formatting_do_not_count_and_numbers_do():
    assert normalized(CODE) == normalized("def f( x ):\n  return (x+1)")
    assert normalized(CODE) != normalized(CODE.replace("1", "2"))
    assert normalized("x = 'text'") != normalized("x = 'other'")


def test_the_hash_is_of_what_computes(monkeypatch):
    from pathlib import Path

    before = code_hash.__wrapped__()
    read = Path.read_text

    def changed(folder):
        def read_text(self, *args, **kwargs):
            more = "\nextra = 1\n" if f"refbn_d2/{folder}" in self.as_posix() else ""
            return read(self, *args, **kwargs) + more

        monkeypatch.setattr(Path, "read_text", read_text)
        return code_hash.__wrapped__()

    assert changed("layers") != before
    assert changed("study/data") != before
    assert changed("study/report") == changed("visualization") == before
