package symbolize

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// errTexts: the save program's output does not fit the table entry by entry.
var errTexts = errors.New("iptables-save's rules do not fit the table")

// mapTexts lays the output of iptables-save -t TABLE over the table's
// entries: texts[i] is entry i's rule without "-A CHAIN ", "" for entries that
// are no rules. It fails rather than give any entry a text that may be
// another's.
func (t *Table) mapTexts(save []byte) ([]string, error) {
	fail := func(format string, args ...any) ([]string, error) {
		return nil, fmt.Errorf("%w: %s", errTexts, fmt.Sprintf(format, args...))
	}
	// Rules of each chain, in order.
	rules := map[string][]int{}
	for i := range t.Entries {
		e := &t.Entries[i]
		if e.Kind == TargetError {
			if _, ok := rules[e.Chain]; ok {
				return fail("two chains %q", e.Chain)
			}
		}
		if _, ok := rules[e.Chain]; !ok {
			rules[e.Chain] = nil
		}
		if e.isRule() {
			rules[e.Chain] = append(rules[e.Chain], i)
		}
	}
	chains, lines, err := t.parseTexts(save)
	if err != nil {
		return fail("%v", err)
	}
	for _, name := range chains {
		if _, ok := rules[name]; !ok {
			return fail("no chain %q", name)
		}
	}
	texts := make([]string, len(t.Entries))
	for _, l := range lines {
		if len(rules[l.chain]) == 0 {
			return fail("chain %q has more rules", l.chain)
		}
		i := rules[l.chain][0]
		rules[l.chain] = rules[l.chain][1:]
		if !t.targetFits(i, l.words) {
			return fail("%s:%d is not %q", l.chain, t.Entries[i].Num, l.text)
		}
		texts[i] = l.text
	}
	for chain, left := range rules {
		if len(left) > 0 {
			return fail("chain %q has %d rules fewer", chain, len(left))
		}
	}
	return texts, nil
}

// saveLine is a rule in the output of a save program.
type saveLine struct {
	chain string
	text  string   // without "-A CHAIN "
	words []string // of text
}

// parseTexts reads what saveTexts gave.
func (t *Table) parseTexts(save []byte) (chains []string, rules []saveLine, err error) {
	if t.Family == ARP {
		return parseARPList(save)
	}
	return parseSave(save, t.Name, true)
}

// parseARPList reads what arptables-legacy -L -n printed.
func parseARPList(list []byte) (chains []string, rules []saveLine, err error) {
	for line := range strings.Lines(string(list)) {
		line = strings.TrimSuffix(line, "\n")
		if line == "" {
			continue
		}
		// No rule begins so: all begin with an option or with "!".
		if name, ok := strings.CutPrefix(line, "Chain "); ok {
			name, _, ok = strings.Cut(name, " (")
			if !ok {
				return nil, nil, fmt.Errorf("line %q", line)
			}
			chains = append(chains, name)
			continue
		}
		if len(chains) == 0 {
			return nil, nil, fmt.Errorf("line %q", line)
		}
		rules = append(rules, saveLine{chains[len(chains)-1], oneLine(strings.TrimRight(line, " ")), strings.Fields(line)})
	}
	return chains, rules, nil
}

// parseSave reads what a save program printed of one table: the chains that it
// declares and the rules. ebtables and arptables print no COMMIT.
func parseSave(save []byte, table string, commit bool) (chains []string, rules []saveLine, err error) {
	inside, ended := false, false
	for line := range strings.Lines(string(save)) {
		line = strings.TrimSuffix(line, "\n")
		if line == "" || line[0] == '#' {
			continue
		}
		if !inside {
			if line != "*"+table || ended {
				return nil, nil, fmt.Errorf("line %q", line)
			}
			inside, ended = true, !commit
			continue
		}
		if line == "COMMIT" && commit {
			inside, ended = false, true
			continue
		}
		if strings.HasPrefix(line, ":") {
			name, _, _ := strings.Cut(line[1:], " ")
			chains = append(chains, name)
			continue
		}
		// A newline in a comment would make one rule two lines; the first then
		// ends within quotes.
		words, ok := splitQuoted(line)
		if !ok || len(words) < 2 || words[0] != "-A" {
			return nil, nil, fmt.Errorf("line %q", line)
		}
		text := oneLine(strings.TrimPrefix(strings.TrimPrefix(line, "-A "+words[1]), " "))
		rules = append(rules, saveLine{words[1], text, words[2:]})
	}
	if !ended {
		return nil, nil, errors.New("no table")
	}
	return chains, rules, nil
}

// splitQuoted splits a line at spaces outside quotes; ok is false where a
// quote is not closed.
func splitQuoted(line string) (words []string, ok bool) {
	var w strings.Builder
	quoted, some := false, false
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == '\\' && quoted && i+1 < len(line):
			i++
			w.WriteByte(line[i])
		case c == '"':
			quoted, some = !quoted, true
		case c == ' ' && !quoted:
			if some || w.Len() > 0 {
				words = append(words, w.String())
			}
			w.Reset()
			some = false
		default:
			w.WriteByte(c)
		}
	}
	if some || w.Len() > 0 {
		words = append(words, w.String())
	}
	return words, !quoted
}

// targetFits compares a rule's target with the -j or -g of its text.
func (t *Table) targetFits(i int, words []string) bool {
	e := &t.Entries[i]
	flag, want := "-j", e.Target
	switch e.Kind {
	case TargetVerdict:
		want = verdictName(uint32(e.Verdict))
	case TargetReturn:
		want = "RETURN"
	case TargetJump:
		want = t.Entries[e.Dest].Chain
	case TargetGoto:
		flag, want = "-g", t.Entries[e.Dest].Chain
	case TargetNext:
		return true
	}
	for k := 0; k+1 < len(words); k++ {
		if words[k] == flag && (words[k+1] == want || want == "CT" && words[k+1] == "NOTRACK") {
			return true
		}
	}
	return false
}

// sbin is where distributions keep iptables, besides PATH.
var sbin = []string{"/usr/sbin", "/sbin", "/usr/local/sbin"}

// saveProgram finds the save program for legacy tables: "iptables-legacy-save",
// or "iptables-save" where that is the legacy one. Of ARP it is arptables itself:
// arptables-legacy-save is a script that prints what "arptables", whichever that is, lists.
func saveProgram(ctx context.Context, family Family) (string, error) {
	prefix, suffix := family.String()+"tables", "-save"
	if family == ARP {
		suffix = ""
	}
	if p, err := lookPath(prefix + "-legacy" + suffix); err == nil {
		return p, nil
	}
	if p, err := lookPath(prefix + suffix); err == nil {
		out, err := exec.CommandContext(ctx, p, "-V").Output()
		if err == nil && !bytes.Contains(out, []byte("nf_tables")) {
			return p, nil
		}
	}
	return "", fmt.Errorf("the texts of %s rules need %s-legacy%s in PATH", prefix, prefix, suffix)
}

func lookPath(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range sbin {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s: %w", name, exec.ErrNotFound)
}

// saveTimeout bounds one run of the save program.
const saveTimeout = 10 * time.Second

// saveTexts runs the save program in the calling thread's network namespace.
// iptables-legacy-save (1.8.9, traced) opens a raw socket, makes the same two
// getsockopt calls as ReadTable and one per extension revision; it takes no
// lock and creates no file. It runs modprobe only where the table is gone:
// -M points that at nothing.
func saveTexts(family Family, table string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), saveTimeout)
	defer cancel()
	prog, err := saveProgram(ctx, family)
	if err != nil {
		return nil, err
	}
	args := []string{"-M", "/nonexistent", "-t", table}
	if family == ARP {
		args = append(args, "-L", "-n")
	}
	return runProgram(ctx, prog, args...)
}

// runProgram runs a program in the calling thread's network namespace and returns
// what it prints.
func runProgram(ctx context.Context, prog string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, prog, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", prog, strings.Join(args, " "), err, oneLine(strings.TrimSpace(stderr.String())))
	}
	return out, nil
}

// sameRules reports that two readings of a table have the same rules, whatever
// their counters: entries are compared by everything but comefrom and counters.
func sameRules(family Family, a, b []byte, t *Table) bool {
	l, ok := layoutOf(family)
	if !ok || len(a) != len(b) {
		return false
	}
	for i := range t.Entries {
		from, to := t.Entries[i].Offset, len(a)
		if i+1 < len(t.Entries) {
			to = t.Entries[i+1].Offset
		}
		// nfcache, comefrom and counters lie between the offsets and the end.
		if !slices.Equal(a[from:from+l.header], b[from:from+l.header]) ||
			!slices.Equal(a[from+l.targetOffset:from+l.targetOffset+4], b[from+l.targetOffset:from+l.targetOffset+4]) ||
			!slices.Equal(a[from+l.size:to], b[from+l.size:to]) {
			return false
		}
	}
	return true
}
