package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/render"
	"github.com/nftrace/nftrace/pkg/symbolize"
	"github.com/nftrace/nftrace/pkg/trace"
)

// nftRulesets are the generations of namespaces' nf_tables that were read. nftrace's own
// namespace is followed from the start, so that none is missed. Whoever follows another keeps it
// alive even if it is deleted: that is done only while it changes.
type nftRulesets struct {
	sys    *symbolize.System
	tracer *trace.Tracer
	say    *speaker

	reading sync.Mutex // held until what was read is kept
	generations[nftID, *nftRuleset]
	read map[uint32]bool // namespaces that were; guarded by reading

	following sync.Mutex // guards followers
	followers map[uint32]*nftFollower
	ended     sync.WaitGroup
}

// nftFollower keeps each generation of a namespace.
type nftFollower struct {
	*symbolize.NFTFollower
	netns uint32
	gen   atomic.Uint32 // the last one that is kept
}

type nftID struct {
	netns uint32
	gen   uint32
}

// nftRuleset is one generation of a namespace's nf_tables.
type nftRuleset struct {
	*symbolize.NFTRuleset
	ns    *symbolize.Namespace
	err   error // why NFTRuleset is nil
	texts bool  // its rules have their texts
	paths map[string]*nftPath
}

func newNFTRulesets(sys *symbolize.System, tracer *trace.Tracer, say *speaker) *nftRulesets {
	return &nftRulesets{sys: sys, tracer: tracer, say: say, read: map[uint32]bool{}, followers: map[uint32]*nftFollower{}}
}

// size is what a ruleset counts for in generations.total: its chains and rules.
func (rs *nftRuleset) size() int {
	n := 1
	if rs.NFTRuleset != nil {
		for _, t := range rs.Tables {
			for _, c := range t.Chains {
				n += 1 + len(c.Rules)
			}
		}
	}
	return n
}

// find returns a namespace's rulesets in one generation, and reads them while they may still
// be there. Without them, what it returns says why nobody can know them.
func (r *nftRulesets) find(id nftID) *nftRuleset {
	return r.generations.find(id, &r.reading, func() (got nftID, rs *nftRuleset, err error) {
		if f := r.followed(id.netns); f != nil && r.await(f, id) {
			if rs = r.get(id); rs != nil {
				return id, rs, nil
			}
			if gen := f.gen.Load(); gen != id.gen {
				return nftID{id.netns, gen}, nil, nil
			}
			// It was forgotten, for there was too much to keep.
			r.drop(f)
		}
		ns, err := r.sys.NamespaceByInode(id.netns)
		if err != nil {
			return got, nil, err
		}
		if ns.Own() || r.read[id.netns] {
			return r.follow(ns)
		}
		r.read[id.netns] = true
		now, err := symbolize.ReadNFT(ns, r.idle(ns))
		if err != nil {
			return got, nil, err
		}
		got, rs = r.keepNFT(ns, now)
		return got, rs, nil
	}, func(err error) *nftRuleset { return &nftRuleset{err: err} })
}

// firstGen is the generation that the first change of a namespace's nf_tables makes.
const firstGen = 2

// committed reads what is there now, after the kernel told that it made a generation. The first one
// is that of a new namespace: what had its inode number before is no more. (Who follows a namespace
// keeps it alive.)
func (r *nftRulesets) committed(id nftID) {
	if id.gen == firstGen && r.followed(id.netns) == nil {
		r.forget(func(old nftID) bool { return old.netns == id.netns })
	}
	r.find(id)
}

func (r *nftRulesets) keepNFT(ns *symbolize.Namespace, now *symbolize.NFTRuleset) (nftID, *nftRuleset) {
	id := nftID{ns.Inode, now.Gen}
	rs := &nftRuleset{NFTRuleset: now, ns: ns, paths: map[string]*nftPath{}}
	r.keep(id, rs)
	return id, rs
}

// idle tells whether a namespace's nf_tables hold still.
func (r *nftRulesets) idle(ns *symbolize.Namespace) func() (bool, error) {
	return func() (idle bool, err error) {
		err = ns.Do(func() error {
			idle, err = r.tracer.NFTIdle()
			return err
		})
		return idle, err
	}
}

// followOwn begins to follow the namespace that nftrace runs in. nf_tables is loaded.
func (r *nftRulesets) followOwn() {
	r.reading.Lock()
	defer r.reading.Unlock()
	ns := r.sys.OwnNamespace()
	if r.followed(ns.Inode) != nil {
		return
	}
	if _, _, err := r.follow(ns); err != nil {
		r.say.detail("%v", err)
	}
}

const (
	// nftQuiet is how long a namespace that is not nftrace's own is followed while nothing changes.
	nftQuiet = time.Second
	// nftLate is how long nftrace waits until the kernel tells of a commit that a packet met: it
	// does when the commit is over.
	nftLate = time.Second
)

// follow begins to follow a namespace that is not followed, and returns what it is now; reading is
// held.
func (r *nftRulesets) follow(ns *symbolize.Namespace) (nftID, *nftRuleset, error) {
	from, now, err := symbolize.FollowNFT(ns, r.idle(ns))
	if err != nil {
		return nftID{}, nil, err
	}
	f := &nftFollower{NFTFollower: from, netns: ns.Inode}
	id, rs := r.keepNFT(ns, now)
	f.gen.Store(now.Gen)
	r.following.Lock()
	r.followers[ns.Inode] = f
	r.following.Unlock()
	r.ended.Go(func() {
		err := r.keepOn(ns, f)
		if r.drop(f) && !errors.Is(err, os.ErrDeadlineExceeded) {
			r.say.detail("%v: it is read again when a packet meets it", err)
		}
	})
	return id, rs, nil
}

// keepOn keeps each generation of a namespace, until nothing more is known of it.
func (r *nftRulesets) keepOn(ns *symbolize.Namespace, f *nftFollower) error {
	for {
		var deadline time.Time
		if !ns.Own() {
			deadline = time.Now().Add(nftQuiet)
		}
		now, err := f.Next(deadline)
		if err != nil {
			return err
		}
		r.keepNFT(ns, now)
		f.gen.Store(now.Gen)
	}
}

func (r *nftRulesets) followed(netns uint32) *nftFollower {
	r.following.Lock()
	defer r.following.Unlock()
	return r.followers[netns]
}

// await waits until a follower has kept all generations up to id, and tells whether it has.
func (r *nftRulesets) await(f *nftFollower, id nftID) bool {
	for end := time.Now().Add(nftLate); r.followed(id.netns) == f; time.Sleep(time.Millisecond) {
		if int32(f.gen.Load()-id.gen) >= 0 {
			return true
		}
		if time.Now().After(end) {
			r.drop(f)
		}
	}
	return false
}

// drop ends a follower, which lets its namespace go; it tells whether that was not done before.
func (r *nftRulesets) drop(f *nftFollower) bool {
	r.following.Lock()
	defer r.following.Unlock()
	if r.followers[f.netns] != f {
		return false
	}
	delete(r.followers, f.netns)
	f.Close()
	return true
}

// close ends all followers.
func (r *nftRulesets) close() {
	r.following.Lock()
	all := slices.Collect(maps.Values(r.followers))
	r.following.Unlock()
	for _, f := range all {
		r.drop(f)
	}
	r.ended.Wait()
}

// readTexts reads the texts of a ruleset's rules.
func (r *nftRulesets) readTexts(rs *nftRuleset) {
	native := rs.ReadTexts(rs.ns)
	if native == "" {
		return
	}
	r.reading.Lock()
	now, err := symbolize.ReadNFT(rs.ns, r.idle(rs.ns))
	r.reading.Unlock()
	// Where it was replaced meanwhile, rules of it are still there, for most changes are small:
	// one with the same handle is the same rule.
	if err == nil && now.Gen != rs.Gen {
		native = now.ReadTexts(rs.ns)
		for _, t := range rs.Tables {
			for _, c := range t.Chains {
				for _, rule := range c.Rules {
					if still := now.Rule(t.Handle, rule.Handle); still != nil {
						rule.Text = still.Text
					}
				}
			}
		}
	}
	if native != "" {
		r.say.detail("nf_tables in %s: rule texts are nftrace's own: %s", nsNames([]*symbolize.Namespace{rs.ns}), native)
	}
}

// nftPath is what a run of a base chain did: packets that do the same share it.
type nftPath struct {
	compat      bool
	chain, kind string
	priority    int
	nat         bool // see events.NFTRun
	rules       []events.Rule
	of          []int // for each of rules the event that it is
}

// seeNFT returns the ruleset of a run, and reads it while it may still be there.
func (r *resolver) seeNFT(s *events.Step) *nftRuleset {
	return r.nft.find(nftID{s.Netns, s.Table.NFT.Gen})
}

// nftRun names what nf_tables told of a run.
func (r *resolver) nftRun(s *events.Step) {
	t := s.Table
	r.key = nftKey(r.key[:0], s)
	rs := r.seeNFT(s)
	path, err := r.nftPath(rs, s)
	if rs.err == nil && (t.NFT.Flipped || path == nil) {
		// It may have met the one before, which another CPU replaced.
		var then *nftPath
		before := r.nft.get(nftID{s.Netns, t.NFT.Gen - 1})
		known := before != nil && before.err == nil
		if known {
			then, _ = r.nftPath(before, s)
		}
		switch {
		case path == nil:
			path = then
		case known && then == nil, then != nil && path.same(then):
		default:
			path, err = nil, fmt.Errorf("%s: the ruleset was replaced while the packet was in it", handles(t.NFT))
		}
	}
	if path != nil {
		n := t.NFT
		n.Compat, n.Chain, n.Type, n.Priority, n.NAT = path.compat, path.chain, path.kind, path.priority, path.nat
		n.LeavesConn = rs.err == nil && !rs.SetsConn && !n.Flipped
	}
	if t.Unresolved == "" && path == nil {
		t.Unresolved = err.Error()
	}
	if t.Unresolved != "" {
		r.unresolved++
		return
	}
	t.Rules = path.rules
	for i, n := range path.of {
		e := &t.NFT.Events[n]
		met := events.Met{From: i, Pkt: e.Packet}
		if e.Unsure {
			met.Pkt, met.Unsure = nil, "this rule changed it, or something at the hook before it"
		}
		if n := len(t.Met); n == 0 || t.Met[n-1].Pkt != met.Pkt {
			t.Met = append(t.Met, met)
		}
	}
	if s.Verdict == events.NFAccept {
		n := t.NFT
		if last := &n.Events[len(n.Events)-1]; n.Behind != nil {
			t.After = n.Behind
		} else if !last.Unsure {
			t.After = last.Packet
		}
	}
}

// same tells whether all that is said of two runs is the same.
func (p *nftPath) same(q *nftPath) bool {
	return p.compat == q.compat && p.chain == q.chain && p.kind == q.kind && p.priority == q.priority &&
		p.nat == q.nat && slices.Equal(p.of, q.of) && slices.Equal(p.rules, q.rules)
}

// nftKey appends all that nftPath looks at, but the ruleset.
func nftKey(key []byte, s *events.Step) []byte {
	n := s.Table.NFT
	key = append(key, s.PF, s.Hook)
	key = binary.NativeEndian.AppendUint64(key, n.Table)
	key = binary.NativeEndian.AppendUint64(key, n.Base)
	for i := range n.Events {
		e := &n.Events[i]
		key = append(key, byte(e.What))
		key = binary.NativeEndian.AppendUint64(key, e.Rule)
		key = binary.NativeEndian.AppendUint64(key, e.Chain)
		key = binary.NativeEndian.AppendUint32(key, uint32(e.Code))
	}
	return key
}

// nftPath returns what a run did as the ruleset has it; r.key is its nftKey.
func (r *resolver) nftPath(rs *nftRuleset, s *events.Step) (*nftPath, error) {
	if rs.err != nil {
		return nil, fmt.Errorf("%s: %w", handles(s.Table.NFT), rs.err)
	}
	if p := rs.paths[string(r.key)]; p != nil {
		return p, nil
	}
	if r.wantTexts && !rs.texts {
		rs.texts = true
		r.nft.readTexts(rs)
	}
	p, err := newNFTPath(rs.NFTRuleset, s)
	if err != nil {
		return nil, err
	}
	for i := range p.rules {
		// The prefix hangs on the table, too.
		named := *s
		table := *s.Table
		run := *s.Table.NFT
		run.Compat = p.compat
		table.NFT, named.Table = &run, &table
		p.rules[i].TracePrefix = render.TracePrefix(&named, &p.rules[i])
	}
	r.roomForPath()
	rs.paths[string(r.key)] = p
	return p, nil
}

// handles is what is known of the rules of a run that nobody can name.
func handles(n *events.NFTRun) string {
	var all []string
	for i := range n.Events {
		if e := &n.Events[i]; e.What == events.NFTRule {
			all = append(all, fmt.Sprint(e.Rule))
		}
	}
	switch len(all) {
	case 0:
		return "no rule"
	case 1:
		return "handle " + all[0]
	}
	return "handles " + strings.Join(all, ", ")
}

// newNFTPath names the events of a run.
func newNFTPath(rules *symbolize.NFTRuleset, s *events.Step) (*nftPath, error) {
	n := s.Table.NFT
	const gone = "the ruleset was replaced meanwhile"
	table, base := rules.Table(n.Table), rules.Chain(n.Table, n.Base)
	if base == nil && policyOnly(n) {
		return unusedChain(rules, s), nil
	}
	if table == nil || base == nil {
		return nil, fmt.Errorf("%s: %s", handles(n), gone)
	}
	p := &nftPath{
		compat: table.Compat, chain: base.Name, kind: base.Type, priority: int(base.Priority), nat: hasNAT(rules, s.PF),
	}
	depth := 0     // as legacy tables count it: jumps and gotos that lead here
	var back []int // where the jumps return to
	up := func() int {
		if len(back) == 0 {
			return 0
		}
		to := back[len(back)-1]
		back = back[:len(back)-1]
		return to
	}
	for i := range n.Events {
		e := &n.Events[i]
		var line events.Rule
		after := depth
		switch e.What {
		case events.NFTRule:
			rule := rules.Rule(n.Table, e.Rule)
			if rule == nil {
				return nil, fmt.Errorf("handle %d: %s", e.Rule, gone)
			}
			action, err := nftAction(rules, n, e, rule)
			if err != nil {
				return nil, err
			}
			line = events.Rule{
				Chain: rule.Chain.Name, Type: events.TypeRule, Num: rule.Num, Handle: rule.Handle,
				Text: rule.Text, Action: action,
			}
			switch {
			case rule.ChainPolicy:
				line.Type, line.IsPolicy, line.Text = events.TypePolicy, true, ""
			case !table.Compat || !rule.Unconditional || rule.Target != "":
			case s.PF == events.PFBridge:
				if e.Code == events.NFTReturn {
					line.Type = events.TypeReturn // as ebtLine has it
				}
			case e.Code >= 0 || e.Code == events.NFTReturn:
				// net/ipv4/netfilter/ip_tables.c:get_chainname_rulenum
				line.Type = events.TypeReturn
				if rule.Chain.Base {
					line.Type = events.TypePolicy
				}
			}
			switch e.Code {
			case events.NFTJump:
				back = append(back, depth)
				after++
			case events.NFTGoto:
				after++
			case events.NFTReturn:
				after = up()
			}
		case events.NFTEnd:
			if e.Chain == n.Base {
				continue // the policy comes next
			}
			chain := rules.Chain(n.Table, e.Chain)
			if chain == nil {
				return nil, fmt.Errorf("%s: %s", handles(n), gone)
			}
			line = events.Rule{Chain: chain.Name, Type: events.TypeReturn, Num: len(chain.Rules) + 1, IsEnd: true, Action: "RETURN"}
			after = up()
		case events.NFTPolicy:
			line = events.Rule{Chain: base.Name, Type: events.TypePolicy, Num: len(base.Rules) + 1, IsPolicy: true, Action: "DROP"}
			if e.Code == events.NFAccept {
				line.Action = "ACCEPT"
			}
			depth = 0
		default:
			return nil, fmt.Errorf("nf_tables told of something unknown to nftrace (%d)", e.What)
		}
		line.Depth = depth
		depth = after
		p.rules = append(p.rules, line)
		p.of = append(p.of, i)
	}
	return p, nil
}

// hasNAT tells whether there are base chains of type nat for packets of a family.
func hasNAT(rules *symbolize.NFTRuleset, pf uint8) bool {
	for _, t := range rules.Tables {
		if t.Family != pf && t.Family != events.PFInet {
			continue
		}
		for _, c := range t.Chains {
			if c.Base && c.Type == "nat" {
				return true
			}
		}
	}
	return false
}

// policyOnly tells whether a packet met nothing of a base chain but its policy.
func policyOnly(n *events.NFTRun) bool {
	for i := range n.Events {
		switch e := &n.Events[i]; {
		case e.What == events.NFTPolicy:
		case e.What == events.NFTEnd && e.Chain == n.Base:
		default:
			return false
		}
	}
	return true
}

// unusedChain is a base chain that is not in the rulesets in force: packets pass it before the
// commit that brings it, and behind the one that takes it away, and none of its rules is there.
func unusedChain(rules *symbolize.NFTRuleset, s *events.Step) *nftPath {
	n := s.Table.NFT
	p := &nftPath{chain: n.Chain, of: []int{len(n.Events) - 1}}
	for _, t := range rules.Tables {
		p.compat = p.compat || t.Family == n.Family && t.Name == s.Table.Name && t.Compat
	}
	line := events.Rule{Chain: n.Chain, Type: events.TypePolicy, Num: 1, IsPolicy: true, Action: "DROP"}
	if n.Events[p.of[0]].Code == events.NFAccept {
		line.Action = "ACCEPT"
	}
	p.rules = []events.Rule{line}
	return p
}

// ending are the statements and targets that are named instead of the verdict that they are
// there for. Where TPROXY finds no socket, or NAT no port, it drops: that is told as a drop.
var ending = map[string]int{
	"REJECT": events.NFDrop, "SYNPROXY": events.NFStolen, "TPROXY": events.NFAccept,
	"DNAT": events.NFAccept, "SNAT": events.NFAccept, "MASQUERADE": events.NFAccept,
	"REDIRECT": events.NFAccept, "NETMAP": events.NFAccept,
}

func nftAction(rules *symbolize.NFTRuleset, n *events.NFTRun, e *events.NFTEvent, rule *symbolize.NFTRule) (string, error) {
	switch e.Code {
	case events.NFTContinue, events.NFTBreak:
		return "continue", nil
	case events.NFTReturn:
		return "RETURN", nil
	case events.NFTJump, events.NFTGoto:
		to := rules.Chain(n.Table, e.Chain)
		if to == nil {
			return "", fmt.Errorf("handle %d: it leads to a chain that is not there", e.Rule)
		}
		if e.Code == events.NFTJump {
			return "jump " + to.Name, nil
		}
		return "goto " + to.Name, nil
	}
	name := strings.ToUpper(rule.Target)
	if usual, ok := ending[name]; ok && e.Code&0xff == usual {
		return name, nil
	}
	switch e.Code & 0xff {
	case events.NFAccept:
		return "ACCEPT", nil
	case events.NFDrop:
		return "DROP", nil
	case events.NFStolen:
		return "STOLEN", nil
	case events.NFQueue:
		return "QUEUE", nil
	}
	return fmt.Sprintf("verdict %d", e.Code), nil
}

// priority is where a table stands among those of a hook: enum nf_ip_hook_priorities. NAT's
// tables, whatever they say, are where NAT is.
func priority(s *events.Step) int {
	early := s.Hook == events.HookPreRouting || s.Hook == events.HookLocalOut
	switch t := s.Table; {
	case t.NFT != nil && t.NFT.Type != "nat":
		return t.NFT.Priority
	case t.NFT != nil || t.Name == "nat":
		if early {
			return -100
		}
		return 100
	case t.Name == "raw":
		return -300
	case t.Name == "mangle":
		return -150
	case t.Name == "security":
		return 50
	}
	return 0
}

// inOrder brings the tables of a part of a hook's call into the order in which the kernel runs
// them: those of nf_tables are in theirs, and so are xtables' behind them. Of equal ones the last
// that came is the first to run, which only the kernel knows: it counts how many of xtables' ran before.
// The one that ended the call was the last.
func inOrder(steps []events.Step, nft int) []events.Step {
	out := make([]events.Step, 0, len(steps))
	mine, others := steps[:nft], steps[nft:]
	for len(mine) > 0 && len(others) > 0 {
		a, b := priority(&mine[0]), priority(&others[0])
		first := ended(&mine[0]) <= ended(&others[0])
		if n := mine[0].Table.NFT; n != nil {
			first = first && n.Runs <= len(steps)-nft-len(others)
		}
		if a < b || a == b && first {
			out, mine = append(out, mine[0]), mine[1:]
		} else {
			out, others = append(out, others[0]), others[1:]
		}
	}
	return append(append(out, mine...), others...)
}

const changedByNFT = "nf_tables may have changed it before"

// behindNFT takes back what is said of the packet in xtables' tables, all but the first nft of
// steps, that may have run behind a base chain that changed it.
func behindNFT(steps []events.Step, nft int) {
	first := math.MaxInt
	for i := range steps[:nft] {
		t := steps[i].Table
		if t.NFT == nil {
			continue // of ebtables, beside whose tables none of xtables' runs
		}
		changed := t.NFT.Behind != nil
		for k := range t.NFT.Events {
			e := &t.NFT.Events[k]
			changed = changed || e.Unsure || e.Packet != &t.Part.Before
		}
		switch {
		case !changed:
		case t.NFT.Chain == "":
			first = math.MinInt // nobody knows where it ran
		default:
			first = min(first, priority(&steps[i]))
		}
	}
	for i := nft; i < len(steps); i++ {
		t := steps[i].Table
		if len(t.Rules) > 0 && priority(&steps[i]) >= first {
			t.Met = append(t.Met[:0], events.Met{Unsure: changedByNFT})
			t.After = nil
		}
	}
}

// ended is 1 if a table kept the packet from going on.
func ended(s *events.Step) int {
	if s.Verdict == events.NFAccept || s.Verdict == events.VerdictUnknown {
		return 0
	}
	return 1
}
