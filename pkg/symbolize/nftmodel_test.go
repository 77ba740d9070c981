package symbolize

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// nftNews are the messages of a commit, by words: +N and -N is a rule that is added behind all
// others and deleted, ^N one that is added before all, N<M rule N behind rule M, =N one that
// replaced the first or the last, ?N one of a kernel that does not tell where it is. All are in
// chain c, "/" is the same in chain d; "!" deletes the table, "*" adds it with both chains. "~" deletes
// chain c, with a list of devices, and "c" adds one of that name.
func nftNews(t testing.TB, words string) []netlink.Message {
	t.Helper()
	var news []netlink.Message
	tell := func(msg uint16, flags netlink.HeaderFlags, f func(*netlink.AttributeEncoder)) {
		e := netlink.NewAttributeEncoder()
		f(e)
		b, err := e.Encode()
		if err != nil {
			t.Fatal(err)
		}
		news = append(news, netlink.Message{
			Header: netlink.Header{Type: nftType(msg), Flags: flags}, Data: append([]byte{unix.NFPROTO_INET, 0, 0, 0}, b...),
		})
	}
	be64 := func(n uint64) []byte { return []byte{0, 0, 0, 0, 0, 0, byte(n >> 8), byte(n)} }
	for _, w := range strings.Fields(words) {
		table := func(e *netlink.AttributeEncoder) {
			e.String(unix.NFTA_TABLE_NAME, "t")
			e.Bytes(nftaTableHandle, be64(7))
		}
		switch w {
		case "!":
			tell(unix.NFT_MSG_DELTABLE, 0, table)
			continue
		case "*":
			tell(unix.NFT_MSG_NEWTABLE, 0, table)
			for i, name := range []string{"c", "d"} {
				tell(unix.NFT_MSG_NEWCHAIN, 0, func(e *netlink.AttributeEncoder) {
					e.String(unix.NFTA_CHAIN_TABLE, "t")
					e.String(unix.NFTA_CHAIN_NAME, name)
					e.Bytes(unix.NFTA_CHAIN_HANDLE, be64(uint64(i+1)))
				})
			}
			continue
		}
		if w == "~" || w == "c" {
			msg, handle := map[string]uint16{"~": unix.NFT_MSG_DELCHAIN, "c": unix.NFT_MSG_NEWCHAIN}[w], map[string]uint64{"~": 1, "c": 3}[w]
			tell(msg, 0, func(e *netlink.AttributeEncoder) {
				e.String(unix.NFTA_CHAIN_TABLE, "t")
				e.String(unix.NFTA_CHAIN_NAME, "c")
				e.Bytes(unix.NFTA_CHAIN_HANDLE, be64(handle))
				e.Nested(unix.NFTA_CHAIN_HOOK, func(e *netlink.AttributeEncoder) error {
					e.Nested(nftaHookDevs, func(e *netlink.AttributeEncoder) error {
						e.String(1, "eth0") // NFTA_DEVICE_NAME
						return nil
					})
					return nil
				})
			})
			continue
		}
		chain := "c"
		if rest, ok := strings.CutPrefix(w, "/"); ok {
			chain, w = "d", rest
		}
		var n, after uint64
		msg, flags := uint16(unix.NFT_MSG_NEWRULE), netlink.HeaderFlags(0)
		switch w[0] {
		case '+':
			flags = netlink.Create | netlink.Append
		case '^':
			flags = netlink.Create
		case '=':
			flags = netlink.Append
		case '-':
			msg = unix.NFT_MSG_DELRULE
		case '?':
		default:
			flags, w = netlink.Create, "<"+w
		}
		if _, err := fmt.Sscanf(w[1:], "%d<%d", &n, &after); n == 0 {
			t.Fatal(w, err)
		}
		tell(msg, flags, func(e *netlink.AttributeEncoder) {
			e.String(unix.NFTA_RULE_TABLE, "t")
			e.String(unix.NFTA_RULE_CHAIN, chain)
			e.Bytes(unix.NFTA_RULE_HANDLE, be64(n))
			if after != 0 {
				e.Bytes(unix.NFTA_RULE_POSITION, be64(after))
			}
		})
	}
	return news
}

// TestNFTModel: rules stand where the messages say, or it is said that they do not say it.
func TestNFTModel(t *testing.T) {
	for _, tt := range []struct {
		commits []string
		want    string // rules of c, and of d; a part of the error
	}{
		{[]string{"* +1 +2 /+3"}, "1 2 / 3"},
		{[]string{"* +1", "+2", "^3"}, "3 1 2 /"},
		{[]string{"* +1 +2", "3<1"}, "1 3 2 /"},
		{[]string{"* +1 +2", "3<4 4<1"}, "1 4 3 2 /"},            // each was put behind 1
		{[]string{"* +1 +2", "3<4 4<5 5<1"}, "1 5 4 3 2 /"},      // so was each of these
		{[]string{"* +1 2<1 +3"}, "1 2 3 /"},                     // of one commit, the last has no position
		{[]string{"* ?1"}, "1 /"},                                // it cannot be elsewhere
		{[]string{"* +1 +2 +3", "-2", "-1"}, "3 /"},              //
		{[]string{"* +1 +2", "-1 -2 +3 4<3 +5"}, "3 4 5 /"},      // a chain that is flushed
		{[]string{"* +1 +2", "-1 -2 +3 +4"}, "where rule 4 is"},  // or 4 was put behind 1, which was there still
		{[]string{"* +1 +2", "-1 -2 +3", "+4"}, "3 4 /"},         // that cannot be here
		{[]string{"* +1 +2", "-1 -2 3<4 +5 +4"}, "rule 4 is"},    // 4 was put behind 1
		{[]string{"* +1 +2", "-2 /+4 ^3"}, "where rule 3 is"},    // it may have been put before 2
		{[]string{"* +1 +2", "-2 +3"}, "1 3 /"},                  // there is nobody behind whom it would be first
		{[]string{"* +1 +2", "-1 ^3"}, "3 2 /"},                  // nor before whom it would be last
		{[]string{"* +1 +2", "-1 /+4 +3"}, "where rule 3 is"},    // it may have been put behind 1
		{[]string{"* +1 +2 +3", "-2 +4 ^5"}, "5 1 3 4 /"},        // so it would have a position
		{[]string{"* +1", "! * +2"}, "2 /"},                      // a table that is made anew
		{[]string{"* +1 +2", "!"}, ""},                           //
		{[]string{"* +1 +2", "/+3 -1"}, "2 / 3"},                 // of another chain
		{[]string{"* +1", "-1", "+2", "+3"}, "2 3 /"},            // of other commits
		{[]string{"* +1 +2", "=3 -1"}, "where rule 3 is"},        //
		{[]string{"* +1 +2", "-1 =3"}, "where rule 3 is"},        //
		{[]string{"* +1", "?2"}, "where rule 2 is"},              // Linux 5.10
		{[]string{"* +1 +2", "+3 -1"}, "may have been replaced"}, // if its flags lie
		{[]string{"* +1 +2", "-1 +3"}, "where rule 3 is"},        //
		{[]string{"* +1", "2<3"}, "behind one that is not there"},
		{[]string{"* +1", "2<3 4<3"}, "two rules behind rule 3"},
		{[]string{"* +1 /+2", "3<2"}, "behind one of another chain"},
		{[]string{"* +1", "~"}, "1 /"},                   // a device is gone
		{[]string{"* +1", "-1", "~"}, "c may be gone"},   // a device, or the chain
		{[]string{"* +1", "-1 ~ c +2"}, "/ 2"},           // the chain, and here is another
		{[]string{"* +1", "-1 ~ ! * +2"}, "2 /"},         //
		{[]string{"* +1", "-1 ~ +2", "-2", "+3"}, "3 /"}, // a device: a rule came into the chain
		{[]string{"*", "c"}, "a second chain c"},         //
		{[]string{"* +1 +1"}, "a second rule 1"},
		{[]string{"* 1<1 ^1"}, "a second rule 1"},
		{[]string{"* -1"}, "no rule 1"},
		{[]string{"+1"}, "is in no chain"},
		{[]string{"!"}, "no table t"},
	} {
		got, err := "", error(nil)
		m := &nftModel{}
		for i, c := range tt.commits {
			var r *NFTRuleset
			if r, err = m.commit(nftNews(t, c), uint32(i), uint32(i+1)); err != nil {
				break
			}
			got = nftRules(r)
		}
		if err != nil && (!errors.Is(err, errNFTGap) || !strings.Contains(err.Error(), tt.want)) || err == nil && got != tt.want {
			t.Errorf("%q: %q, %v, want %q", tt.commits, got, err, tt.want)
		}
	}
	m := &nftModel{}
	if _, err := m.commit(nftNews(t, "*"), 5, 7); !errors.Is(err, errNFTGap) {
		t.Errorf("a generation was missed: %v", err)
	}
	if r, err := m.commit(nftNews(t, "*"), 1<<32-1, 1); err != nil || r.Gen != 1 {
		t.Errorf("there is no generation 0: %v", err)
	}
}

// TestNFTModelOrder holds what the model makes of many commits against what the kernel does, as in
// nf_tables_newrule, nf_tables_commit and nf_tables_rule_notify.
func TestNFTModelOrder(t *testing.T) {
	rnd := rand.New(rand.NewPCG(13, 17))
	type rule struct {
		n       int
		deleted bool // it will be: a position may still be that of it
	}
	var m *nftModel
	var rules []*rule
	told, gaps, n := 0, 0, 0
	for range 7001 {
		if m == nil || n > 200 {
			m, n, rules = &nftModel{}, 0, nil
			if _, err := m.commit(nftNews(t, "*"), 1, 2); err != nil {
				t.Fatal(err)
			}
		}
		type step struct {
			r    *rule
			flag string
		}
		var steps []step
		del := func(r *rule) {
			r.deleted = true
			steps = append(steps, step{r, "-"})
		}
		add := func(at int, flag string) {
			n++
			r := &rule{n: n}
			rules = slices.Insert(rules, at, r)
			steps = append(steps, step{r, flag})
		}
		for range 1 + rnd.IntN(6) {
			op, at := rnd.IntN(9), 0
			if len(rules) > 0 {
				at = rnd.IntN(len(rules))
			}
			switch {
			case op < 2:
				add(len(rules), "+")
			case op == 2:
				add(0, "^")
			case len(rules) == 0:
			case op == 3:
				add(at+1, "+")
			case op == 4:
				add(at, "^")
			case op == 5:
				for _, r := range rules {
					if !r.deleted {
						del(r)
					}
				}
			case rules[at].deleted:
			case op == 6:
				del(rules[at])
			case op == 7:
				del(rules[at])
				add(at, "=")
			default: // older kernels
				old := rules[at]
				add(at, "+")
				del(old)
			}
		}
		var words []string
		for _, s := range steps {
			switch i := slices.Index(rules, s.r); {
			case s.flag == "-":
				rules = slices.Delete(rules, i, i+1)
				fallthrough
			case i == 0, i == len(rules)-1:
				words = append(words, fmt.Sprint(s.flag, s.r.n))
			default:
				words = append(words, fmt.Sprintf("%d<%d", s.r.n, rules[i-1].n))
			}
		}
		r, err := m.commit(nftNews(t, strings.Join(words, " ")), 2, 3)
		if err != nil {
			if !errors.Is(err, errNFTGap) {
				t.Fatal(err)
			}
			m = nil
			gaps++
			continue
		}
		want := ""
		for _, r := range rules {
			want += fmt.Sprint(r.n, " ")
		}
		if got := nftRules(r); got != want+"/" {
			t.Fatalf("%q: %q, want %q", words, got, want)
		}
		told++
	}
	t.Logf("%d commits told, %d not", told, gaps)
	if told < 3001 {
		t.Error("that is not enough")
	}
}

func nftRules(r *NFTRuleset) string {
	var words []string
	for _, t := range r.Tables {
		for i, c := range t.Chains {
			if i > 0 {
				words = append(words, "/")
			}
			for _, rule := range c.Rules {
				words = append(words, fmt.Sprint(rule.Handle))
			}
		}
	}
	return strings.Join(words, " ")
}

// A model that takes messages has each rule once, under its handle and with its number.
func FuzzNFTModel(f *testing.F) {
	f.Add([]byte("\x00\x11\x12\x31\x82"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 64 {
			return
		}
		words := []string{"*"}
		for i, op := range b {
			n := int(op&15) + 1
			switch op >> 4 {
			case 0:
				words = append(words, "!", "*")
			case 1, 2:
				words = append(words, fmt.Sprintf("+%d", n))
			case 3:
				words = append(words, fmt.Sprintf("^%d", n))
			case 4:
				words = append(words, fmt.Sprintf("-%d", n))
			case 5:
				words = append(words, fmt.Sprintf("/+%d", n))
			case 6:
				words = append(words, fmt.Sprintf("/-%d", n))
			case 7:
				words = append(words, fmt.Sprintf("?%d", n))
			default:
				words = append(words, fmt.Sprintf("%d<%d", n, i%16+1))
			}
		}
		m := &nftModel{}
		r, err := m.commit(nftNews(t, strings.Join(words, " ")), 1, 2)
		if err != nil {
			if !errors.Is(err, errNFTGap) {
				t.Fatal(err)
			}
			return
		}
		for _, table := range r.Tables {
			n := 0
			for _, c := range table.Chains {
				for i, rule := range c.Rules {
					n++
					if rule.Num != i+1 || rule.Chain != c || r.Rule(table.Handle, rule.Handle) != rule {
						t.Errorf("%q: rule %d", words, rule.Handle)
					}
				}
			}
			if n != len(table.rules) {
				t.Errorf("%q: %d rules, %d handles", words, n, len(table.rules))
			}
		}
	})
}
