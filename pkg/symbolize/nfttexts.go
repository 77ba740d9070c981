package symbolize

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ReadTexts fills the Text of all rules. Those of Compat tables have the line
// of the table's save program (iptables-nft-save and its like) without
// "-A CHAIN "; those of other tables have what nft lists, without counters'
// values. So have Compat tables with a rule that iptables-nft did not write,
// since the save program prints such rules wrong, and those for which the
// program would load kernel modules or does not do. Where nft does not do either,
// where the output does not fit the ruleset rule by rule, or where the ruleset
// has changed, the text is rendered here, and native says why. A table that two rulesets share keeps
// the texts that it has.
func (r *NFTRuleset) ReadTexts(ns *Namespace) (native string) {
	texts := map[*NFTRule]string{}
	var err error
	if slices.ContainsFunc(r.Tables, (*NFTTable).wantsTexts) {
		err = ns.netlink(unix.NETLINK_NETFILTER, func(c *netlink.Conn) error {
			return r.readTexts(c.Execute, texts, func(t *NFTTable) ([]byte, error) {
				return nftSave(ns.sys, t)
			}, nftList)
		})
	}
	for _, t := range r.Tables {
		all := true
		for _, c := range t.Chains {
			for _, rule := range c.Rules {
				s, ok := texts[rule]
				all = all && ok
				if ok {
					rule.Text = s
				} else if rule.Text == "" {
					rule.Text = rule.native
				}
			}
		}
		t.printed = t.printed || all
	}
	if err != nil {
		return err.Error()
	}
	return ""
}

// readTexts puts what it finds into texts, in the calling thread's namespace;
// the error says why something is missing. save and list run the programs.
func (r *NFTRuleset) readTexts(ask nftKernel, texts map[*NFTRule]string,
	save func(*NFTTable) ([]byte, error), list func() ([]byte, error)) error {
	// What a program printed is r's only if the ruleset is r before and after.
	same := func() error {
		gen, err := nftGen(ask)
		if err == nil && gen != r.Gen {
			err = errors.New("the ruleset changed while its rules' texts were read")
		}
		return err
	}
	if err := same(); err != nil {
		return err
	}
	var left []*NFTTable
	for _, t := range r.Tables {
		if !t.wantsTexts() {
			continue
		}
		if t.Compat && !t.foreign() {
			out, err := save(t)
			if err == nil {
				if err := same(); err != nil {
					return err
				}
				var m map[*NFTRule]string
				if m, err = t.mapSave(out); err == nil {
					maps.Copy(texts, m)
					continue
				}
			}
		}
		left = append(left, t)
	}
	if len(left) == 0 {
		return nil
	}
	out, err := list()
	if err != nil {
		return err
	}
	if err := same(); err != nil {
		return err
	}
	lists := splitNFTList(out, left)
	for _, t := range left {
		m, mapErr := t.mapList(lists[t])
		if mapErr != nil && err == nil {
			err = fmt.Errorf("nft's list of table %s %s does not fit its rules: %w", nftFamilies[t.Family], t.Name, mapErr)
		}
		maps.Copy(texts, m)
	}
	return err
}

// wantsTexts reports that the table has rules, and not the texts of all of them.
func (t *NFTTable) wantsTexts() bool {
	for _, c := range t.Chains {
		if len(c.Rules) > 0 {
			return !t.printed
		}
	}
	return false
}

func (t *NFTTable) foreign() bool {
	for _, c := range t.Chains {
		for _, r := range c.Rules {
			if r.foreign {
				return true
			}
		}
	}
	return false
}

// nftFamilies are the families as nft names them.
var nftFamilies = map[uint8]string{
	unix.NFPROTO_INET: "inet", unix.NFPROTO_IPV4: "ip", unix.NFPROTO_ARP: "arp",
	unix.NFPROTO_NETDEV: "netdev", unix.NFPROTO_BRIDGE: "bridge", unix.NFPROTO_IPV6: "ip6",
}

// nftSavePrograms are the prefixes of the save programs' names.
var nftSavePrograms = map[uint8]string{
	unix.NFPROTO_IPV4: "iptables", unix.NFPROTO_IPV6: "ip6tables",
	unix.NFPROTO_ARP: "arptables", unix.NFPROTO_BRIDGE: "ebtables",
}

// nftSaveProgram finds the save program: "iptables-nft-save", or
// "iptables-save" where that is a link to xtables-nft-multi. Programs for
// legacy tables are not even asked: they create tables.
func nftSaveProgram(family uint8) (string, error) {
	prefix := nftSavePrograms[family]
	if p, err := lookPath(prefix + "-nft-save"); err == nil {
		return p, nil
	}
	if p, err := lookPath(prefix + "-save"); err == nil {
		if real, err := filepath.EvalSymlinks(p); err == nil && strings.Contains(filepath.Base(real), "nft") {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s-nft-save is not in PATH", prefix)
}

// nftSave runs the save program of a Compat table, unless that would load
// modules: the program asks nft_compat for the revisions of extensions that it
// prints native expressions as. Where iptables-nft made the rules it asked then.
// -M has no part in this, that is for modprobe. arptables has one table and no
// -t.
func nftSave(s *System, t *NFTTable) ([]byte, error) {
	for _, c := range t.Chains {
		for _, r := range c.Rules {
			for _, m := range r.modules {
				if s.wouldLoad(m) || s.wouldLoad("nft_compat") {
					return nil, fmt.Errorf("the save program would load %s", m)
				}
			}
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), saveTimeout)
	defer cancel()
	prog, err := nftSaveProgram(t.Family)
	if err != nil {
		return nil, err
	}
	args := []string{"-M", "/nonexistent", "-t", t.Name}
	if t.Family == unix.NFPROTO_ARP {
		args = args[:2]
	}
	return runProgram(ctx, prog, args...)
}

// nftList runs nft: with handles, without the values of counters and without
// the elements of named sets, which can be many.
func nftList() ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), saveTimeout)
	defer cancel()
	prog, err := lookPath("nft")
	if err != nil {
		return nil, errors.New("nft is not in PATH")
	}
	return runProgram(ctx, prog, "-a", "-s", "-t", "list", "ruleset")
}

// mapSave lays the output of a save program over the table's rules.
func (t *NFTTable) mapSave(save []byte) (map[*NFTRule]string, error) {
	_, lines, err := parseSave(save, t.Name, t.Family == unix.NFPROTO_IPV4 || t.Family == unix.NFPROTO_IPV6)
	if err != nil {
		return nil, err
	}
	left := map[string][]*NFTRule{}
	texts := map[*NFTRule]string{}
	for _, c := range t.Chains {
		for _, r := range c.Rules {
			if r.ChainPolicy {
				texts[r] = r.native
				continue
			}
			left[c.Name] = append(left[c.Name], r)
		}
	}
	for _, l := range lines {
		if len(left[l.chain]) == 0 {
			return nil, fmt.Errorf("chain %q has more rules", l.chain)
		}
		r := left[l.chain][0]
		left[l.chain] = left[l.chain][1:]
		if err := r.fits(l.words); err != nil {
			return nil, err
		}
		texts[r] = l.text
	}
	for chain, rules := range left {
		if len(rules) > 0 {
			return nil, fmt.Errorf("chain %q has %d rules fewer", chain, len(rules))
		}
	}
	return texts, nil
}

// splitNFTList finds the tables' parts in the output of nft list ruleset:
// the lines between the first, which names the table, and the closing brace.
// A table that seems to be there twice has none.
func splitNFTList(out []byte, tables []*NFTTable) map[*NFTTable][]string {
	first := map[string]*NFTTable{}
	for _, t := range tables {
		first[fmt.Sprintf("table %s %s { # handle %d", nftFamilies[t.Family], t.Name, t.Handle)] = t
	}
	lists := map[*NFTTable][]string{}
	twice := map[*NFTTable]bool{}
	var in *NFTTable
	var lines []string
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case in == nil:
			in, lines = first[line], nil
		case line == "}":
			_, twice[in] = lists[in]
			lists[in] = lines
			in = nil
		default:
			lines = append(lines, line)
		}
	}
	for t := range twice {
		if twice[t] {
			delete(lists, t)
		}
	}
	return lists
}

// mapList lays nft's list of a table (nft: src/rule.c:table_print) over its
// rules. nft prints strings as they are, so that a line proves nothing: every
// rule has to be there once, in its chain, in order, with its handle, and
// nothing else may be among them.
func (t *NFTTable) mapList(lines []string) (map[*NFTRule]string, error) {
	l := nftLister{table: t, lines: lines, texts: map[*NFTRule]string{}}
	first := map[string]*NFTChain{}
	for _, c := range t.Chains {
		if !c.anonymous {
			first[fmt.Sprintf("\tchain %s { # handle %d", c.Name, c.Handle)] = c
		}
	}
	for len(l.lines) > 0 {
		line := l.next()
		c := first[line]
		switch {
		case c != nil:
			delete(first, line)
			l.declaration(c)
			if err := l.rules(c, "\t\t"); err != nil {
				return nil, err
			}
			if end := l.next(); end != "\t}" {
				return nil, fmt.Errorf("chain %s: line %q", c.Name, end)
			}
		case strings.HasPrefix(line, "\tchain "):
			return nil, fmt.Errorf("line %q", line)
		case strings.HasPrefix(line, "\t") && strings.Contains(line, " { # handle "):
			// A set, a map, a named object.
			for line != "\t}" {
				if len(l.lines) == 0 {
					return nil, errors.New("no end of a set or an object")
				}
				line = l.next()
			}
		}
	}
	for _, c := range t.Chains {
		for _, r := range c.Rules {
			if _, ok := l.texts[r]; !ok {
				return nil, fmt.Errorf("%s:%d is not there", c.Name, r.Num)
			}
		}
	}
	return l.texts, nil
}

// nftLister walks through the lines of nft's list of a table.
type nftLister struct {
	table *NFTTable
	lines []string
	texts map[*NFTRule]string
}

// next takes a line; "" where there are no more.
func (l *nftLister) next() string {
	line := l.peek()
	l.lines = l.lines[min(1, len(l.lines)):]
	return line
}

func (l *nftLister) peek() string {
	if len(l.lines) == 0 {
		return ""
	}
	return l.lines[0]
}

// declaration takes what is in a chain before its rules.
func (l *nftLister) declaration(c *NFTChain) {
	if s := l.peek(); strings.HasPrefix(s, "\t\tcomment \"") && strings.HasSuffix(s, `"`) {
		l.next()
	}
	if s := l.peek(); c.Base && strings.HasPrefix(s, "\t\ttype "+c.Type+" hook ") && strings.HasSuffix(s, ";") {
		l.next()
	}
}

// rules takes the rules of a chain; each is one line, but for an anonymous
// chain:
//
//	iifname "lo" jump {
//		tcp dport 22 accept
//	} # handle 23
func (l *nftLister) rules(c *NFTChain, indent string) error {
	for _, r := range c.Rules {
		line := l.next()
		text, ok := strings.CutPrefix(line, indent)
		if _, done := l.texts[r]; !ok || done {
			return fmt.Errorf("%s:%d: line %q", c.Name, r.Num, line)
		}
		handle := fmt.Sprintf(" # handle %d", r.Handle)
		inner := l.anonymous(r)
		switch {
		case inner != nil && strings.HasSuffix(text, " {"):
			if err := l.rules(inner, indent+"\t"); err != nil {
				return err
			}
			if end := l.next(); end != indent+"}" && end != indent+"}"+handle {
				return fmt.Errorf("%s:%d: line %q", c.Name, r.Num, end)
			}
			text += " " + more + " }"
		case inner != nil:
			return fmt.Errorf("%s:%d: line %q", c.Name, r.Num, line)
		case strings.HasSuffix(text, handle):
			text = strings.TrimSuffix(text, handle)
		case !c.anonymous: // nft (1.0.6) gives rules of anonymous chains no handles
			return fmt.Errorf("%s:%d: line %q", c.Name, r.Num, line)
		}
		l.texts[r] = oneLine(strings.TrimLeft(text, " ")) // xt comments are printed as ""
	}
	return nil
}

// anonymous returns the anonymous chain that a rule jumps or goes to.
func (l *nftLister) anonymous(r *NFTRule) *NFTChain {
	if r.verdict != unix.NFT_JUMP && r.verdict != unix.NFT_GOTO {
		return nil
	}
	for _, c := range l.table.Chains {
		if c.anonymous && c.Name == r.dest {
			return c
		}
	}
	return nil
}
