package render

import (
	"encoding/binary"
	"unicode/utf8"
)

const hexDigits = "0123456789abcdef"

// unsafeRune says whether r could do more to a terminal or a line reader than
// show itself: C0, DEL and C1 controls, the line and paragraph separators, and
// the marks that change the direction of text.
func unsafeRune(r rune) bool {
	switch {
	case r < 0x20, r >= 0x7f && r <= 0x9f:
		return true
	case r == 0x061c, // ARABIC LETTER MARK
		r == 0x200e, r == 0x200f, // LRM, RLM
		r == 0x2028, r == 0x2029, // line, paragraph separator
		r >= 0x202a && r <= 0x202e, // embeddings, overrides
		r >= 0x2066 && r <= 0x2069, // isolates
		r == 0xfeff:                // zero width no-break space
		return true
	}
	return false
}

// clean says whether s can be printed as it is.
func clean(s string) bool {
	for i := 0; i < len(s); {
		if c := s[i]; c < utf8.RuneSelf {
			if c < 0x20 || c == 0x7f {
				return false
			}
			i++
			continue
		}
		r, n := utf8.DecodeRuneInString(s[i:])
		if r == utf8.RuneError && n == 1 || unsafeRune(r) {
			return false
		}
		i += n
	}
	return true
}

// printable says whether b is ASCII that can be printed as it is; it looks at eight bytes
// at a time.
func printable(b []byte) bool {
	const ones, highs = 0x0101010101010101, 0x8080808080808080
	for ; len(b) >= 8; b = b[8:] {
		x := binary.NativeEndian.Uint64(b)
		// A byte's high bit is set: not ASCII; after the subtraction: below 0x20;
		// after the addition: DEL. Borrows and carries come from bytes that are
		// not printable themselves.
		if (x|(x-0x20*ones)|(x+ones))&highs != 0 {
			return false
		}
	}
	for _, c := range b {
		if c < 0x20 || c >= 0x7f {
			return false
		}
	}
	return true
}

// escape returns s with every byte of an unsafe rune, and every byte that is
// not UTF-8, written as \xNN, the way dmesg writes them.
func escape(s string) string {
	if clean(s) {
		return s
	}
	return string(appendEscaped(make([]byte, 0, len(s)+16), s))
}

func appendEscaped(b []byte, s string) []byte {
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		if r == utf8.RuneError && n == 1 || unsafeRune(r) {
			for _, c := range []byte(s[i : i+n]) {
				b = append(b, '\\', 'x', hexDigits[c>>4], hexDigits[c&15])
			}
		} else {
			b = append(b, s[i:i+n]...)
		}
		i += n
	}
	return b
}
