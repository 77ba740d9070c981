package symbolize

import (
	"encoding/binary"
	"fmt"
	"testing"
)

// rule is a rule of a table that a test makes up.
type rule struct {
	src    string   // "10.0.0.0/8" or "": a condition in the header
	match  []string // names of matches, with no data
	target string   // "", ACCEPT, DROP, QUEUE, RETURN, "jump C", "goto C", or an extension's name
	data   []byte
}

type chain struct {
	name   string // a hook's name for a built-in chain
	policy string // built-in: ACCEPT or DROP
	rules  []rule
}

func putInfo(family Family, name string, info Info) []byte {
	b := make([]byte, infoSize(family))
	copy(b, name)
	put := func(i int, v uint32) { binary.NativeEndian.PutUint32(b[tableNameSize+4*i:], v) }
	put(0, info.ValidHooks)
	n := len(family.hookNames())
	for h := range n {
		put(1+h, info.HookEntry[h])
		put(1+n+h, info.Underflow[h])
	}
	put(1+2*n, info.NumEntries)
	put(2+2*n, info.Size)
	return b
}

func extension(name string, data []byte) []byte {
	size := (xtHeaderSize + len(data) + 7) &^ 7
	b := make([]byte, size)
	binary.NativeEndian.PutUint16(b, uint16(size))
	copy(b[2:31], name)
	copy(b[xtHeaderSize:], data)
	return b
}

// blob lays chains out as iptables does: built-in chains with their policies,
// user chains with an ERROR head and a RETURN at the end, an ERROR entry.
func blob(t testing.TB, family Family, chains []chain) (Info, []byte) {
	t.Helper()
	l, ok := layoutOf(family)
	if !ok {
		t.Fatal("family")
	}
	var out []byte
	var info Info
	type fix struct {
		at   int
		name string
	}
	var fixes []fix
	starts := map[string]int{}
	entry := func(r rule) {
		e := make([]byte, l.size)
		if r.src != "" {
			e[0] = 10
			for i := range l.addr {
				e[2*l.addr+i] = 0xff
			}
		}
		for _, m := range r.match {
			e = append(e, extension(m, nil)...)
		}
		verdict := func(v int) []byte {
			d := make([]byte, 4)
			binary.NativeEndian.PutUint32(d, uint32(int32(v)))
			return extension("", d)
		}
		target := len(e)
		switch {
		case r.target == "":
			e = append(e, verdict(0)...)
			binary.NativeEndian.PutUint32(e[target+xtHeaderSize:], uint32(len(out)+len(e)))
		case r.target == "ACCEPT":
			e = append(e, verdict(-2)...)
		case r.target == "DROP":
			e = append(e, verdict(-1)...)
		case r.target == "QUEUE":
			e = append(e, verdict(-4)...)
		case r.target == "RETURN":
			e = append(e, verdict(-5)...)
		case len(r.target) > 5 && (r.target[:5] == "jump " || r.target[:5] == "goto "):
			e = append(e, verdict(0)...)
			if r.target[0] == 'g' {
				e[l.flags] |= byte(l.gotoFl)
			}
			fixes = append(fixes, fix{len(out) + target + xtHeaderSize, r.target[5:]})
		default:
			e = append(e, extension(r.target, r.data)...)
		}
		binary.NativeEndian.PutUint16(e[l.targetOffset:], uint16(target))
		binary.NativeEndian.PutUint16(e[l.nextOffset:], uint16(len(e)))
		out = append(out, e...)
		info.NumEntries++
	}
	errorEntry := func(name string) {
		entry(rule{target: errorTarget, data: append([]byte(name), make([]byte, 30-len(name))...)})
	}
	for _, c := range chains {
		hook := -1
		for h, n := range family.hookNames() {
			if n == c.name {
				hook = h
			}
		}
		if hook >= 0 {
			info.ValidHooks |= 1 << hook
			info.HookEntry[hook] = uint32(len(out))
		} else {
			errorEntry(c.name)
			starts[c.name] = len(out)
		}
		for _, r := range c.rules {
			entry(r)
		}
		if hook >= 0 {
			info.Underflow[hook] = uint32(len(out))
			entry(rule{target: c.policy})
		} else {
			entry(rule{target: "RETURN"})
		}
	}
	errorEntry(errorTarget)
	for _, f := range fixes {
		to, ok := starts[f.name]
		if !ok {
			t.Fatalf("no chain %q", f.name)
		}
		binary.NativeEndian.PutUint32(out[f.at:], uint32(to))
	}
	info.Size = uint32(len(out))
	return info, out
}

func build(t testing.TB, family Family, chains ...chain) *Table {
	t.Helper()
	info, b := blob(t, family, chains)
	tab, err := ParseTable(family, "test", info, b)
	if err != nil {
		t.Fatal(err)
	}
	return tab
}

// at finds the entry that is number num of a chain.
func at(t testing.TB, tab *Table, name string, num int) int {
	t.Helper()
	for i := range tab.Entries {
		if tab.Entries[i].Chain == name && tab.Entries[i].Num == num {
			return i
		}
	}
	t.Fatalf("no %s:%d", name, num)
	return -1
}

func (v Visit) String() string { return fmt.Sprintf("%s:%s:%d", v.Chain, v.Type, v.Num) }
