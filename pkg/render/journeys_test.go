package render

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nftrace/nftrace/pkg/events"
)

// The journeys of shared/SCENARIOS.md, as events would hand them over.

var (
	docker0 = events.Device{Index: 3, Name: "docker0"}
	eth0    = events.Device{Index: 2, Name: "eth0"}
	vethc1  = events.Device{Index: 5, Name: "vethc1"}
	vethc2  = events.Device{Index: 7, Name: "vethc2"}
	ctEth0  = events.Device{Index: 6, Name: "eth0"}
	gre1    = events.Device{Index: 8, Name: "gre1"}
	gre2    = events.Device{Index: 9, Name: "gre2"}
	vxlan0  = events.Device{Index: 10, Name: "vxlan0"}
)

const hostNS, c1NS, c2NS = 4026531840, 4026532201, 4026532202

// builder makes a journey step by step.
type builder struct {
	j     events.Journey
	pkt   events.Packet
	where events.Step // namespace, family, hook and devices of the steps to come
}

func journey(p events.Packet) *builder {
	return &builder{
		j:     events.Journey{ID: 7, Start: 90 * time.Second, First: p, Outcome: events.Outcome{Step: -1, Rule: -1}},
		pkt:   p,
		where: events.Step{Place: &events.Place{Netns: hostNS, PF: p.Family}},
	}
}

func (b *builder) step(s events.Step) *builder {
	place := *s.Place // b.where changes
	place.Netns = b.where.Netns
	s.Place, s.NetnsName = &place, b.where.NetnsName
	s.Time = b.j.Start + time.Duration(len(b.j.Steps)+1)*time.Microsecond
	s.CPU = 1
	b.j.Steps = append(b.j.Steps, s)
	return b
}

func (b *builder) netns(ino uint32, name string) *builder {
	b.where.Netns, b.where.NetnsName = ino, name
	return b
}

// at sets hook and devices: in, out, physin, physout.
func (b *builder) at(pf, hook uint8, devs ...events.Device) *builder {
	var d [4]events.Device
	copy(d[:], devs)
	b.where.PF, b.where.Hook = pf, hook
	b.where.In, b.where.Out, b.where.PhysIn, b.where.PhysOut = d[0], d[1], d[2], d[3]
	return b
}

// reinjected is where it was before, behind a queue.
func (b *builder) reinjected() *builder {
	b.where.Reinjected = true
	return b
}

func (b *builder) change(f func(*events.Packet)) *builder {
	b.pkt.Data = append([]byte{}, b.pkt.Data...)
	f(&b.pkt)
	return b
}

func (b *builder) ct(state string, reply bool) *builder {
	return b.change(func(p *events.Packet) { p.CT, p.CTReply = state, reply })
}

func (b *builder) ttl(n byte) *builder {
	return b.change(func(p *events.Packet) { p.Data[8] = n })
}

// table adds a run; each rule is "CHAIN:type:N depth|text|action".
func (b *builder) table(name string, verdict int, rules ...string) *builder {
	s := b.where
	p := b.pkt
	after := p
	run := &events.TableRun{Name: name, Before: &p, After: &after}
	if len(rules) > 0 {
		run.Met = []events.Met{{Pkt: &p}}
	}
	for _, r := range rules {
		f := strings.Split(r, "|")
		id, depth, _ := strings.Cut(f[0], " ")
		c := strings.Split(id, ":")
		num, _ := strconv.Atoi(c[2])
		d, _ := strconv.Atoi(depth)
		run.Rules = append(run.Rules, events.Rule{
			Chain: c[0], Type: events.RuleType(c[1]), Num: num, Depth: d,
			Text: f[1], Action: f[2],
			IsPolicy: c[1] == "policy" && f[1] == "", IsEnd: c[1] == "return" && f[1] == "",
		})
	}
	if verdict != events.NFAccept {
		run.After = nil
	}
	s.Kind, s.Verdict, s.Table = events.StepTable, verdict, run
	return b.step(s)
}

// nft says that the last table is nf_tables': of that family, and of iptables-nft if compat is
// set. Its rules have handles from 13 on, but for policies and ends.
func (b *builder) nft(family uint8, chain, kind string, priority int, compat bool) *builder {
	run := b.j.Steps[len(b.j.Steps)-1].Table
	run.NFT = &events.NFTRun{Family: family, Table: 7, Base: 1, Gen: 13, Chain: chain, Type: kind, Priority: priority, Compat: compat}
	for i := range run.Rules {
		if r := &run.Rules[i]; !r.IsPolicy && !r.IsEnd {
			r.Handle = uint64(13 + i)
		}
	}
	return b
}

// ebt makes the last table one of ebtables-legacy, whose run began at that hook.
func (b *builder) ebt(hook uint8) *builder {
	run := b.j.Steps[len(b.j.Steps)-1].Table
	run.EBT = &events.EBTRun{Hook: hook, Verdict: events.NFAccept}
	return b
}

// toMAC says that the last table has changed the packet's destination.
func (b *builder) toMAC(mac byte) *builder {
	after := b.j.Steps[len(b.j.Steps)-1].Table.After
	after.MAC = append([]byte{2, 0, 0, 0, 0, mac}, after.MAC[6:]...)
	b.pkt.MAC = after.MAC
	return b
}

// besideNAT says that nf_tables has chains of type nat, too.
func (b *builder) besideNAT() *builder {
	b.j.Steps[len(b.j.Steps)-1].Table.NFT.NAT = true
	return b
}

// unresolved says that nobody knows what the last table did.
func (b *builder) unresolved(why string) *builder {
	b.j.Steps[len(b.j.Steps)-1].Table.Unresolved = why
	return b
}

// marked says that the last table set the mark, before its last rule.
func (b *builder) marked(mark uint32) *builder {
	b.change(func(p *events.Packet) { p.Mark = mark })
	run := b.j.Steps[len(b.j.Steps)-1].Table
	run.After.Mark = mark
	p := b.pkt
	run.Met = append(run.Met, events.Met{From: len(run.Rules) - 1, Pkt: &p})
	return b
}

// marks gives the mark that each rule of the last table saw, and the last one to all
// that comes after.
func (b *builder) marks(marks ...uint32) *builder {
	run := b.j.Steps[len(b.j.Steps)-1].Table
	run.Met = nil
	for i, m := range marks {
		b.change(func(p *events.Packet) { p.Mark = m })
		p := b.pkt
		run.Met = append(run.Met, events.Met{From: i, Pkt: &p})
		run.After.Mark = m
	}
	return b
}

func (b *builder) policy(table string, n int) *builder {
	return b.table(table, events.NFAccept, hookName(b.where.PF, b.where.Hook)+":policy:"+strconv.Itoa(n)+"||ACCEPT")
}

func (b *builder) hook(verdict int) *builder {
	s := b.where
	s.Kind, s.Verdict = events.StepHook, verdict
	return b.step(s)
}

// nat rewrites the packet, if it is one of IPv4 that was captured.
func (b *builder) nat(source, reply bool, proto uint8, before, after string) *builder {
	if len(b.pkt.Data) >= 20 && b.pkt.Data[0] == 0x45 {
		b.change(func(p *events.Packet) {
			t := tuple(proto, after)
			copy(p.Data[12:], t.Src.Addr().AsSlice())
			copy(p.Data[16:], t.Dst.Addr().AsSlice())
			if (proto == protoTCP || proto == protoUDP) && len(p.Data) >= 24 {
				binary.BigEndian.PutUint16(p.Data[20:], t.Src.Port())
				binary.BigEndian.PutUint16(p.Data[22:], t.Dst.Port())
			}
		})
	}
	return b.step(events.Step{Place: &events.Place{}, Kind: events.StepNAT,
		NAT: &events.NAT{Source: source, CTReply: reply, Before: tuple(proto, before), After: tuple(proto, after)}})
}

func tuple(proto uint8, s string) events.Tuple {
	src, dst, _ := strings.Cut(s, " ")
	return events.Tuple{Proto: proto, Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst)}
}

func (b *builder) flowtable(table, name string, nat *events.NAT) *builder {
	s := b.where
	s.Kind, s.Verdict = events.StepFlowtable, events.VerdictUnknown
	s.Flowtable, s.NAT = &events.Flowtable{Family: events.PFInet, Table: table, Name: name}, nat
	return b.step(s)
}

func (b *builder) bridge(d events.Device) *builder {
	return b.step(events.Step{Place: &events.Place{Out: d}, Kind: events.StepBridge})
}

func (b *builder) xmit(d events.Device) *builder {
	return b.step(events.Step{Place: &events.Place{Out: d}, Kind: events.StepXmit})
}

func (b *builder) deliver() *builder {
	return b.step(events.Step{Place: &events.Place{}, Kind: events.StepDeliver})
}

func (b *builder) end(o events.Outcome) *events.Journey {
	b.j.Outcome = o
	return &b.j
}

func (b *builder) sent(d events.Device) *events.Journey {
	return b.end(events.Outcome{Kind: events.OutSent, Device: d, NetnsName: b.where.NetnsName, Step: -1, Rule: -1})
}

func (b *builder) delivered() *events.Journey {
	return b.end(events.Outcome{Kind: events.OutDelivered, NetnsName: b.where.NetnsName, Step: -1, Rule: -1})
}

// by ends at the last step, with its last rule.
func (b *builder) by(kind events.OutcomeKind) *events.Journey {
	step, rule := len(b.j.Steps)-1, -1
	if t := b.j.Steps[step].Table; t != nil {
		rule = len(t.Rules) - 1
	}
	return b.end(events.Outcome{Kind: kind, NetnsName: b.where.NetnsName, Step: step, Rule: rule})
}

func tcpPacket(src, dst string, sport, dport uint16, flags byte) events.Packet {
	l4 := make([]byte, 20)
	l4[0], l4[1], l4[2], l4[3] = byte(sport>>8), byte(sport), byte(dport>>8), byte(dport)
	l4[12], l4[13] = 0x50, flags
	return with(pkt4(v4{id: 99, frag: 0x4000, ttl: 64, proto: 6, src: src, dst: dst, l4: l4}.bytes()), func(p *events.Packet) { p.MAC = dockMAC })
}

func ping(src, dst string, reply bool) events.Packet {
	h := echo4
	h.src, h.dst = src, dst
	h.l4 = append([]byte{}, echo...)
	if reply {
		h.l4[0] = 0
	}
	return with(pkt4(h.bytes()), func(p *events.Packet) { p.MAC = dockMAC })
}

var forwardStart = []string{
	"FORWARD:rule:1|-j DOCKER-USER|jump DOCKER-USER",
	"DOCKER-USER:return:1 1|-j RETURN|RETURN",
	"FORWARD:rule:2|-j DOCKER-ISOLATION-STAGE-1|jump DOCKER-ISOLATION-STAGE-1",
}

func forward(rules ...string) []string {
	return append(append([]string{}, forwardStart...), rules...)
}

func journeys() map[string]*events.Journey {
	pre, in, fwd, out, post := uint8(events.HookPreRouting), uint8(events.HookLocalIn), uint8(events.HookForward), uint8(events.HookLocalOut), uint8(events.HookPostRouting)
	ip, br := uint8(events.PFIPv4), uint8(events.PFBridge)
	return map[string]*events.Journey{
		"s1-request": journey(ping(c2, c1, false)).netns(c2NS, "c2").xmit(ctEth0).netns(hostNS, "").
			at(ip, pre, docker0, events.Device{}, vethc2).policy("raw", 1).ct("NEW", false).policy("mangle", 1).policy("nat", 2).hook(events.NFAccept).
			at(br, pre, vethc2).hook(events.NFStolen).
			bridge(vethc1).
			at(ip, fwd, docker0, docker0, vethc2, vethc1).policy("mangle", 1).table("filter", events.NFAccept, forward(
			"DOCKER-ISOLATION-STAGE-1:return:2 1|-j RETURN|RETURN",
			"FORWARD:rule:4|-o docker0 -j DOCKER|jump DOCKER",
			"DOCKER:return:1 1||RETURN",
			"FORWARD:rule:6|-i docker0 -o docker0 -j ACCEPT|ACCEPT")...).hook(events.NFAccept).
			at(ip, post, events.Device{}, docker0, vethc2, vethc1).policy("mangle", 1).policy("nat", 2).hook(events.NFAccept).
			xmit(vethc1).netns(c1NS, "c1").deliver().delivered(),
		"s1-reply": journey(ping(c1, c2, true)).
			at(ip, pre, docker0, events.Device{}, vethc1).policy("raw", 1).ct("ESTABLISHED", true).policy("mangle", 1).
			at(ip, fwd, docker0, docker0, vethc1, vethc2).policy("mangle", 1).table("filter", events.NFAccept, forward(
			"DOCKER-ISOLATION-STAGE-1:return:2 1|-j RETURN|RETURN",
			"FORWARD:rule:3|-o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT|ACCEPT")...).
			at(ip, post, events.Device{}, docker0, vethc1, vethc2).policy("mangle", 1).
			xmit(vethc2).sent(vethc2),
		"s3-request": journey(ping(c2, "10.211.55.1", false)).
			at(ip, pre, docker0, events.Device{}, vethc2).policy("raw", 1).ct("NEW", false).policy("mangle", 1).policy("nat", 2).
			ttl(63).at(ip, fwd, docker0, eth0, vethc2).policy("mangle", 1).table("filter", events.NFAccept, forward(
			"DOCKER-ISOLATION-STAGE-1:rule:1 1|-i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2|jump DOCKER-ISOLATION-STAGE-2",
			"DOCKER-ISOLATION-STAGE-2:return:2 2|-j RETURN|RETURN",
			"DOCKER-ISOLATION-STAGE-1:return:2 1|-j RETURN|RETURN",
			"FORWARD:rule:5|-i docker0 ! -o docker0 -j ACCEPT|ACCEPT")...).
			at(ip, post, events.Device{}, eth0).policy("mangle", 1).
			table("nat", events.NFAccept, "POSTROUTING:rule:1|-s 172.17.0.0/16 ! -o docker0 -j MASQUERADE|MASQUERADE").
			nat(true, false, 1, "172.17.0.3:5 10.211.55.1:5", "10.211.55.8:5 10.211.55.1:5").
			xmit(eth0).sent(eth0),
		"s7-later": journey(tcpPacket("10.211.55.1", "10.211.55.8", 40000, 8080, 0x18)).
			at(ip, pre, eth0).policy("raw", 1).ct("ESTABLISHED", false).policy("mangle", 1).
			nat(false, false, 6, "10.211.55.1:40000 10.211.55.8:8080", "10.211.55.1:40000 172.17.0.2:80").
			ttl(63).at(ip, fwd, eth0, docker0).policy("mangle", 1).table("filter", events.NFAccept, forward(
			"DOCKER-ISOLATION-STAGE-1:return:2 1|-j RETURN|RETURN",
			"FORWARD:rule:3|-o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT|ACCEPT")...).
			at(ip, post, events.Device{}, docker0).policy("mangle", 1).
			xmit(docker0).bridge(vethc1).xmit(vethc1).sent(vethc1),
		// The reply: nothing but NAT at POSTROUTING, where no table is loaded.
		"s7-reply": journey(tcpPacket(c1, "10.211.55.1", 80, 40000, 0x12)).
			at(ip, pre, docker0, events.Device{}, vethc1).policy("raw", 1).ct("ESTABLISHED", true).policy("mangle", 1).
			ttl(63).at(ip, fwd, docker0, eth0, vethc1).table("filter", events.NFAccept, forward(
			"DOCKER-ISOLATION-STAGE-1:return:2 1|-j RETURN|RETURN",
			"FORWARD:rule:5|-i docker0 ! -o docker0 -j ACCEPT|ACCEPT")...).hook(events.NFAccept).
			nat(true, true, 6, "172.17.0.2:80 10.211.55.1:40000", "10.211.55.8:8080 10.211.55.1:40000").
			at(ip, post, events.Device{}, eth0).hook(events.NFAccept).
			xmit(eth0).sent(eth0),
		"s5-ebtables": journey(ping("172.17.0.1", c1, false)).
			at(ip, out, events.Device{}, docker0).policy("raw", 1).ct("NEW", false).
			table("mangle", events.NFAccept, "OUTPUT:rule:1|-m comment --comment \"mark pings\" -j MARK --set-xmark 0x10/0xffffffff|continue", "OUTPUT:policy:2||ACCEPT").
			marked(0x10).policy("nat", 2).policy("filter", 1).
			at(ip, post, events.Device{}, docker0).policy("mangle", 1).policy("nat", 2).
			xmit(docker0).
			at(br, out, events.Device{}, vethc1).policy("nat", 1).policy("filter", 1).
			at(br, post, events.Device{}, vethc1).policy("nat", 1).
			xmit(vethc1).netns(c1NS, "c1").
			at(ip, in, ctEth0).policy("filter", 1).deliver().delivered(),
		// Beside iptables-nft, whose names are others; a table that is not known, a change of the
		// Ethernet address and a chain of the user's that decides by its policy.
		"ebtables": journey(ping(c2, c1, false)).
			at(br, pre, vethc2).table("broute", events.NFAccept).ebt(events.HookBrouting).unresolved("the table was replaced while the packet was in it").
			table("nat", events.NFAccept, "PREROUTING:rule:1|-p IPv4 -j dnat --to-dst 02:00:00:00:00:99 --dnat-target CONTINUE|continue", "PREROUTING:policy:2||ACCEPT").ebt(pre).toMAC(0x99).
			at(ip, pre, docker0, events.Device{}, vethc2).table("filter", events.NFAccept, "PREROUTING:policy:1||ACCEPT").nft(events.PFIPv4, "PREROUTING", "filter", 0, true).
			at(br, fwd, vethc2, vethc1).table("filter", events.NFDrop, "FORWARD:rule:1|-p IPv4 -j U|jump U", "U:policy:1 1||DROP").ebt(fwd).by(events.OutDropped),
		// Not bridged, but routed.
		"ebtables-broute": journey(ping(c2, c1, false)).
			at(br, pre, vethc2).table("broute", events.NFAccept, "BROUTING:rule:1|-p IPv4 -j DROP|DROP (route it)").ebt(events.HookBrouting).
			at(ip, pre, vethc2).policy("raw", 1).deliver().delivered(),
		"dropped-by-rule": journey(tcpPacket(c2, "172.18.0.2", 40000, 80, 2)).
			at(ip, pre, docker0, events.Device{}, vethc2).policy("raw", 1).ct("NEW", false).policy("nat", 2).
			ttl(63).at(ip, fwd, docker0, events.Device{Index: 9, Name: "br-1f2e3d"}, vethc2).table("filter", events.NFDrop, forward(
			"DOCKER-ISOLATION-STAGE-1:rule:1 1|-i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2|jump DOCKER-ISOLATION-STAGE-2",
			"DOCKER-ISOLATION-STAGE-2:rule:1 2|-o docker0 -j DROP|DROP")...).hook(events.NFDrop).
			dropTable(),
		// Below br_netfilter: when the hooks return the packet is gone, and the bridge's
		// port with it; the hook that began it all says STOLEN.
		"dropped-in-bridge": journey(tcpPacket(c2, "10.211.55.1", 40000, 80, 2)).
			at(ip, pre, docker0, events.Device{}, vethc2).policy("raw", 1).ct("NEW", false).
			table("mangle", events.NFAccept, "PREROUTING:rule:1|-j MARK --set-xmark 0x7/0xffffffff|continue",
				"PREROUTING:rule:2|-p tcp -j M|jump M", "M:rule:1 1|-j MARK --set-xmark 0x8/0xffffffff|continue",
				"M:return:2 1||RETURN", "PREROUTING:policy:3||ACCEPT").marks(0, 7, 7, 8, 8).
			ttl(63).at(ip, fwd, docker0, eth0, vethc2).table("filter", events.NFDrop, "FORWARD:rule:1|-p tcp -j DROP|DROP").
			at(ip, fwd, docker0, eth0).hook(events.NFDrop).
			at(ip, pre, docker0).hook(events.NFStolen).
			dropTable(),
		"dropped-by-policy": journey(tcpPacket("10.211.55.1", c1, 40000, 80, 2)).
			at(ip, fwd, eth0, docker0).table("filter", events.NFDrop, "FORWARD:policy:7||DROP").by(events.OutDropped),
		"rejected": journey(tcpPacket("10.211.55.1", c1, 40000, 80, 2)).
			at(ip, in, eth0).table("filter", events.NFDrop, "INPUT:rule:4|-p tcp -m tcp --dport 80 -j REJECT --reject-with tcp-reset|REJECT").by(events.OutDropped),
		// TRACE says "policy" of a rule; conntrack drops at the hook; records were lost.
		"dropped-by-hook": func() *events.Journey {
			b := journey(tcpPacket("10.211.55.1", c1, 40000, 80, 2))
			b.j.HalfSeen = "nftrace attached while the packet was on its way"
			b.j.Lost = 2
			return b.at(ip, post, events.Device{}, eth0).
				table("mangle", events.NFAccept, "POSTROUTING:policy:3|-j ACCEPT|ACCEPT").hook(events.NFDrop).by(events.OutDropped)
		}(),
		// Tables of another hook say nothing of this one.
		"dropped-without-table": journey(tcpPacket("10.211.55.1", c1, 40000, 80, 2)).
			at(ip, pre, eth0).policy("raw", 1).hook(events.NFAccept).
			at(ip, fwd, eth0, docker0).hook(events.NFDrop).by(events.OutDropped),
		"unresolved": func() *events.Journey {
			b := journey(ping(c2, c1, false)).at(ip, fwd, docker0, docker0).table("filter", events.NFDrop)
			b.j.Steps[0].Table.Unresolved = "two packets ran through the table at the same time"
			return b.by(events.OutDropped)
		}(),
		"hotdrop": func() *events.Journey {
			b := journey(ping(c2, c1, false)).at(ip, fwd, docker0, docker0).table("filter", events.NFDrop, "FORWARD:rule:1|-p tcp|continue")
			b.j.Steps[0].Table.Hotdrop = "a match of filter:FORWARD:rule:2 dropped the packet as malformed (hotdrop)"
			return b.end(events.Outcome{Kind: events.OutDropped, Step: 0, Rule: -1})
		}(),
		"stolen": journey(ping(c2, c1, false)).at(ip, pre, eth0).hook(events.NFStolen).by(events.OutStolen),
		"queued": journey(ping(c2, c1, false)).at(ip, in, eth0).
			table("filter", events.NFQueue, "INPUT:rule:1|-j NFQUEUE --queue-num 3|NFQUEUE").hook(events.NFQueue).
			end(events.Outcome{Kind: events.OutQueued, Step: 0, Rule: 0}),
		"requeued": journey(ping(c2, c1, false)).at(ip, in, eth0).
			table("mangle", events.NFQueue, "INPUT:rule:1|-j NFQUEUE --queue-num 3|NFQUEUE").hook(events.NFAccept).
			at(ip, in, eth0).reinjected().change(func(p *events.Packet) { p.Mark = 7 }).
			table("filter", events.NFQueue, "INPUT:rule:1|-j NFQUEUE --queue-num 4|NFQUEUE").hook(events.VerdictUnknown).
			end(events.Outcome{Kind: events.OutDropped, Step: 2, Rule: 0}),
		"freed": journey(ping(c2, c1, false)).at(ip, pre, eth0).policy("raw", 1).
			end(events.Outcome{Kind: events.OutFreed, Step: -1, Rule: -1}),
		// All that is left of it is where it went.
		"unknown": func() *events.Journey {
			b := journey(events.Packet{VLAN: -1}).at(ip, post, events.Device{}, eth0).hook(events.NFAccept)
			b.j.HalfSeen, b.j.Lost = "the record of its beginning was lost", 3
			return b.end(events.Outcome{Kind: events.OutFreed, Step: -1, Rule: -1})
		}(),
		"hostile": func() *events.Journey {
			b := journey(ping(c2, c1, false)).netns(c1NS, "c1\x1b]0;pwned\a\u202e")
			return b.at(ip, in, events.Device{Index: 4, Name: "e\x1b[2Jth\xff"}).
				table("fil\nter", events.NFDrop, "INPUT\r:rule:1|-m comment --comment \"\u009b31m <b>&\u2028\xc3\"|DR\x00OP").by(events.OutDropped)
		}(),
		// S9 12: a stale entry rewrites a packet that is NEW, and table nat is not asked.
		"stale-udp": journey(pkt4(v4{id: 1, ttl: 64, proto: 17, src: c2, dst: "10.96.0.10", l4: udp53}.bytes())).
			at(ip, pre, docker0).ct("NEW", false).policy("mangle", 1).
			nat(false, false, 17, "172.17.0.3:35559 10.96.0.10:53", "172.17.0.3:35559 10.244.0.9:53").hook(events.NFAccept).
			at(ip, fwd, docker0, eth0).hook(events.NFAccept).
			end(events.Outcome{Kind: events.OutUnknown, Step: -1, Rule: -1}),
		// nf_tables alone, of several families.
		"nft": journey(tcpPacket("10.211.55.1", c1, 40000, 80, 2)).
			at(ip, pre, eth0).table("raw", events.NFAccept, "pre:policy:1||ACCEPT").nft(events.PFIPv4, "pre", "filter", -300, false).
			ct("NEW", false).table("nat", events.NFAccept, "pre:rule:1|tcp dport 80 dnat to 172.17.0.2:8080|DNAT").nft(events.PFIPv4, "pre", "nat", -100, false).
			nat(false, false, 6, "10.211.55.1:40000 172.17.0.2:80", "10.211.55.1:40000 172.17.0.2:8080").hook(events.NFAccept).
			ttl(63).at(ip, fwd, eth0, docker0).
			table("fw", events.NFAccept, "fwd:rule:1|meta mark set 0x00000007|continue", "fwd:rule:3|iifname \"eth0\" jump web|jump web",
				"web:rule:1 1|ct state new goto deep|goto deep", "deep:return:2 2||RETURN", "fwd:policy:5||ACCEPT").nft(events.PFInet, "fwd", "filter", 0, false).
			marks(0, 7, 7, 7, 7).
			table("fw", events.NFDrop, "late:rule:2|tcp dport 8080 counter reject with tcp reset|REJECT").nft(events.PFInet, "late", "filter", 10, false).
			hook(events.NFDrop).dropTable(),
		"nft-policy": journey(tcpPacket("10.211.55.1", c1, 40000, 80, 2)).
			at(ip, in, eth0).table("fw", events.NFDrop, "in:policy:3||DROP").nft(events.PFInet, "in", "filter", 0, false).
			hook(events.NFDrop).dropTable(),
		// The connection's first packet settled NAT: the table named so has no chain of that type.
		"nft-established": journey(tcpPacket("10.211.55.1", c1, 40000, 80, 0x18)).
			at(ip, pre, eth0).ct("ESTABLISHED", false).
			table("nat", events.NFAccept, "pre:policy:1||ACCEPT").nft(events.PFIPv4, "pre", "filter", -100, false).hook(events.NFAccept).
			deliver().delivered(),
		"nft-established-nat": journey(tcpPacket("10.211.55.1", c1, 40000, 80, 0x18)).
			at(ip, pre, eth0).ct("ESTABLISHED", false).hook(events.NFAccept).
			at(ip, in, eth0).ct("ESTABLISHED", false).
			table("filter", events.NFAccept, "INPUT:policy:1||ACCEPT").nft(events.PFIPv4, "INPUT", "filter", 0, true).besideNAT().hook(events.NFAccept).
			deliver().delivered(),
		"nft-bridge": journey(ping(c2, c1, false)).
			at(br, fwd, vethc2, vethc1).table("b", events.NFAccept, "f:rule:1|meta pkttype unicast accept|ACCEPT").nft(events.PFBridge, "f", "filter", -200, false).
			table("filter", events.NFDrop, "FORWARD:rule:1|-p IPv4 -j DROP|DROP").nft(events.PFBridge, "FORWARD", "filter", -200, true).
			hook(events.NFDrop).dropTable(),
		// iptables-nft alone looks as iptables-legacy does.
		"nft-compat": journey(tcpPacket("10.211.55.1", c1, 40000, 80, 2)).
			at(ip, in, eth0).ct("NEW", false).
			table("filter", events.NFDrop, "INPUT:rule:1|-p tcp -j U|jump U", "U:return:1 1|-j RETURN|RETURN", "INPUT:policy:2|-j DROP|DROP").
			nft(events.PFIPv4, "INPUT", "filter", 0, true).hook(events.NFDrop).dropTable(),
		"nft-queued": journey(ping(c2, c1, false)).at(ip, in, eth0).
			table("fw", events.NFQueue, "in:rule:1|queue to 11|QUEUE").nft(events.PFInet, "in", "filter", 0, false).hook(events.VerdictUnknown).
			end(events.Outcome{Kind: events.OutQueued, Step: 0, Rule: 0}),
		"flowtable": journey(tcpPacket(c2, "10.211.55.1", 40000, 80, 16)).netns(hostNS, "").
			at(events.PFNetdev, 0, docker0).flowtable("t", "fast", nil).hook(events.NFAccept).sent(eth0),
		"flowtable-nat": journey(tcpPacket(c2, "10.211.55.8", 40000, 80, 16)).netns(hostNS, "").
			at(events.PFNetdev, 0, docker0).
			flowtable("t\x1b[2J", "fa\x1b[1mst\n", &events.NAT{Before: tuple(6, "172.17.0.3:40000 10.211.55.8:80"), After: tuple(6, "10.211.55.8:40000 10.211.55.1:8080")}).
			hook(events.NFAccept).sent(eth0),
		"nft-both": journey(tcpPacket("10.211.55.1", c1, 40000, 80, 2)).
			at(ip, in, eth0).ct("NEW", false).
			table("mangle", events.NFAccept, "INPUT:policy:1||ACCEPT").
			table("fw", events.NFAccept, "in:policy:1||ACCEPT").nft(events.PFInet, "in", "filter", -10, false).
			table("filter", events.NFAccept, "INPUT:rule:1|-p tcp -j ACCEPT|ACCEPT").
			table("filter", events.NFDrop, "INPUT:rule:1|-p tcp -j DROP|DROP").nft(events.PFIPv4, "INPUT", "filter", 0, true).
			hook(events.NFDrop).dropTable(),
		"nft-both-legacy": journey(tcpPacket("10.211.55.1", c1, 40000, 80, 2)).
			at(ip, in, eth0).ct("NEW", false).
			table("filter", events.NFAccept, "INPUT:policy:1||ACCEPT").nft(events.PFIPv4, "INPUT", "filter", 0, true).
			table("filter", events.NFDrop, "INPUT:policy:4||DROP").hook(events.NFDrop).dropTable(),
		// nft's own tables are told from legacy ones by their families.
		"nft-native-legacy": journey(tcpPacket("10.211.55.1", c1, 40000, 80, 2)).
			at(ip, in, eth0).ct("NEW", false).
			table("filter", events.NFAccept, "input:policy:1||ACCEPT").nft(events.PFIPv4, "input", "filter", -10, false).
			policy("filter", 1).hook(events.NFAccept).deliver().delivered(),
		"nft-unresolved": journey(tcpPacket("10.211.55.1", c1, 40000, 80, 2)).
			at(ip, in, eth0).
			table("fw", events.NFAccept).nft(events.PFInet, "", "", 0, false).unresolved("handles 13, 17: the ruleset was replaced meanwhile").
			table("fw", events.NFDrop).nft(events.PFInet, "", "", 0, false).unresolved("handle 19: the ruleset was replaced meanwhile").
			by(events.OutDropped),
		"nft-gone": journey(tcpPacket("10.211.55.1", c1, 40000, 80, 2)).
			at(ip, in, eth0).
			table("fw", events.NFStolen).nft(events.PFInet, "in", "filter", 0, false).unresolved("the packet was gone before nf_tables told which rule took it").
			by(events.OutStolen),
		"nft-hostile": func() *events.Journey {
			b := journey(ping(c2, c1, false)).at(ip, in, eth0).
				table("f\x1b[2Jw\u202e", events.NFAccept, "in\r\x1b]0;p\a:rule:1|jump w\x00eb|jump w\x1b[1mb").nft(events.PFInet, "in\r\x1b]0;p\a", "filter", 0, false).
				table("f\n2", events.NFDrop, "i\nn:policy:1||DROP").nft(events.PFIPv6, "i\nn", "fil\u009bter", 0, false)
			j := b.by(events.OutDropped)
			return b.table("f\xff", events.NFDrop).nft(200, "\x7f", "", 0, false).unresolved("\x1b[31m\u2028").end(j.Outcome)
		}(),
		"untracked": journey(pkt4(v4{id: 1, ttl: 64, proto: 17, src: c2, dst: c1, l4: udp53}.bytes())).
			at(ip, pre, docker0).table("raw", events.NFAccept, "PREROUTING:rule:1|-p udp -j CT --notrack|continue", "PREROUTING:policy:2||ACCEPT").
			ct("UNTRACKED", false).policy("mangle", 1).deliver().delivered(),
		// Through two tunnels, where masquerading and then an entry of conntrack's rewrite it.
		"tunnel": func() *events.Journey {
			b := journey(tcpPacket(c2, "10.1.0.2", 40000, 80, 0x18)).ttl(63).ct("ESTABLISHED", false).
				at(ip, fwd, docker0, gre1).policy("filter", 1).
				at(ip, post, docker0, gre1).policy("mangle", 1).
				nat(true, false, 6, "172.17.0.3:40000 10.1.0.2:80", "10.9.0.1:40000 10.1.0.2:80").hook(events.NFAccept).
				xmit(gre1)
			inner := b.pkt.Data
			b.pkt = pkt4(v4{id: 2, ttl: 255, proto: 47, src: "192.168.0.1", dst: "203.0.113.1", l4: append(raw("0000 0800"), inner...)}.bytes())
			b.ct("NEW", false).at(ip, out, events.Device{}, gre2).table("filter", events.NFAccept, "OUTPUT:rule:1|-p gre -j ACCEPT|ACCEPT").hook(events.NFAccept).
				at(ip, post, events.Device{}, gre2).policy("nat", 2).
				nat(true, false, 47, "192.168.0.1:0 203.0.113.1:0", "192.0.2.9:0 203.0.113.1:0").hook(events.NFAccept).
				xmit(gre2).
				at(ip, out, events.Device{}, eth0).hook(events.NFAccept).
				nat(true, false, 4, "10.0.0.1:0 10.0.0.2:0", "192.0.2.8:0 10.0.0.2:0").
				at(ip, post, events.Device{}, eth0).hook(events.NFAccept)
			return b.xmit(eth0).sent(eth0)
		}(),
		// Of another family, and out of it again; fragments are no other packets.
		"tunnel-6in4": func() *events.Journey {
			b := journey(pkt6(v6{first: "60000000", next: 17, hop: 64, src: g1, dst: g2, rest: udp53}.bytes())).
				at(events.PFIPv6, out, events.Device{}, gre1).policy("filter", 1).xmit(gre1)
			inner := b.pkt
			b.pkt = pkt4(v4{id: 2, ttl: 64, proto: 41, src: c2, dst: c1, l4: inner.Data}.bytes())
			b.at(ip, out, events.Device{}, eth0).policy("filter", 1)
			b.pkt = pkt4(v4{id: 2, ttl: 64, frag: 1, proto: 41, src: c2, dst: c1, l4: inner.Data}.bytes())
			b.at(ip, post, events.Device{}, eth0).policy("mangle", 1)
			b.pkt = inner
			b.at(events.PFIPv6, pre, eth0).policy("mangle", 1)
			b.pkt = pkt6(v6{first: "60000000", next: 44, hop: 64, src: g1, dst: g2, rest: raw("3c00 05a8 0000beef 1100 0104")}.bytes())
			return b.at(events.PFIPv6, in, eth0).policy("filter", 1).deliver().delivered()
		}(),
		"tunnel-arp": func() *events.Journey {
			b := journey(pkt4(raw("0001 0800 06 04 0001 0242ac110003 ac110003 000000000000 ac110002")))
			b.j.First.EtherType, b.j.First.Family = 0x0806, 0
			b.at(br, fwd, vethc2, vxlan0).hook(events.NFAccept).xmit(vxlan0)
			b.pkt = pkt4(v4{id: 2, ttl: 64, proto: 17, src: c2, dst: c1, l4: udp53}.bytes())
			return b.at(ip, out, events.Device{}, eth0).ct("NEW", false).policy("filter", 1).xmit(eth0).sent(eth0)
		}(),
		// By the first rule that matched it, at the device's ingress.
		"sent-on": journey(pkt4(v4{id: 2, ttl: 64, proto: 17, src: c2, dst: c1, l4: udp53}.bytes())).
			at(events.PFNetdev, events.HookIngress, eth0).hook(events.NFStolen).
			xmit(vethc1).sent(vethc1),
		// Cut up where it was sent, and put together where it arrived.
		"fragmented": func() *events.Journey {
			whole := v4{id: 2, ttl: 64, proto: 17, src: c2, dst: c1, l4: append(slices.Clone(udp53), make([]byte, 2000)...)}
			b := journey(pkt4(whole.bytes()))
			b.at(ip, post, events.Device{}, eth0).policy("mangle", 1).hook(events.NFAccept).xmit(eth0)
			first := whole
			first.frag, first.l4 = 0x2000, whole.l4[:1480]
			b.pkt = pkt4(first.bytes())
			b.at(ip, pre, eth0).policy("raw", 1).hook(events.NFAccept)
			b.pkt = pkt4(whole.bytes())
			return b.at(ip, in, eth0).policy("filter", 1).hook(events.NFAccept).deliver().delivered()
		}(),
		// IPVS sends on what came for the address of its service, and nobody tells of it.
		"ipvs": func() *events.Journey {
			b := journey(tcpPacket("10.211.55.1", "10.211.55.8", 40000, 8080, 2))
			b.at(ip, in, eth0).policy("filter", 1).hook(events.NFAccept)
			b.pkt = tcpPacket("10.211.55.1", c1, 40000, 80, 2)
			return b.at(ip, out, events.Device{}, docker0).policy("filter", 1).hook(events.NFAccept).xmit(docker0).sent(docker0)
		}(),
		// NAT's rewrite is told where it is.
		"dnat": func() *events.Journey {
			b := journey(tcpPacket("10.211.55.1", "10.211.55.8", 40000, 8080, 2))
			b.at(ip, pre, eth0).policy("nat", 1).nat(false, false, 6, "10.211.55.1:40000 10.211.55.8:8080", "10.211.55.1:40000 172.17.0.2:80").hook(events.NFAccept)
			return b.at(ip, fwd, eth0, docker0).policy("filter", 1).hook(events.NFAccept).xmit(docker0).sent(docker0)
		}(),
		"empty": {},
	}
}

// dropTable names the last table's last rule as what decided.
func (b *builder) dropTable() *events.Journey {
	for i := len(b.j.Steps) - 1; i >= 0; i-- {
		if t := b.j.Steps[i].Table; t != nil {
			return b.end(events.Outcome{Kind: events.OutDropped, Step: i, Rule: len(t.Rules) - 1})
		}
	}
	panic("no table")
}
