# As a Docker host with iptables-nft has it, and what the other programs make.
iptables-nft-restore <<'EOT'
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
:KUBE-FW - [0:0]
-A INPUT
-A INPUT -m comment --comment "say \"hi\" \\ # handle 3" -j ACCEPT
-A INPUT -p tcp -m multiport --dports 22,80 -m conntrack --ctstate NEW -m limit --limit 5/sec -j LOG --log-prefix "in: " --log-level 7
-A INPUT -p icmp -j NFLOG --nflog-group 5 --nflog-prefix "x"
-A INPUT -p udp -j NFQUEUE --queue-num 3
-A INPUT -m mark --mark 0x4000/0x4000 -g KUBE-FW
-A INPUT -s 10.1.0.0/16 ! -i lo -p tcp -j REJECT --reject-with tcp-reset
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
-A KUBE-FW -m comment --comment "for a comment's sake" -j RETURN
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
*mangle
:FORWARD ACCEPT [0:0]
-A FORWARD -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
-A OUTPUT -j MARK --set-xmark 0x1/0xffffffff
COMMIT
*raw
-A PREROUTING -p tcp -m tcp --dport 80 -j TRACE
-A OUTPUT -d 10.9.0.0/16 -j CT --notrack
COMMIT
EOT
ip6tables-nft-restore <<'EOT'
*filter
:INPUT DROP [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -p ipv6-icmp -m icmp6 --icmpv6-type 135 -j ACCEPT
-A INPUT -s fe80::/10 -j REJECT --reject-with icmp6-adm-prohibited
COMMIT
EOT
ebtables-nft -N X
ebtables-nft -N Y -P DROP
ebtables-nft -N Z -P RETURN
ebtables-nft -A FORWARD -p IPv4 --ip-src 1.2.3.4 -j X
ebtables-nft -A FORWARD -p ARP --arp-op Request -j Y
ebtables-nft -A Y -p ARP -j CONTINUE
ebtables-nft -A Y -s 02:00:00:00:00:01 -j DROP
ebtables-nft -t nat -A PREROUTING -j mark --mark-set 3 --mark-target CONTINUE
ebtables-nft -t nat -A POSTROUTING -s 02:00:00:00:00:02 -j snat --to-src 02:00:00:00:00:03
arptables-nft -A INPUT -s 10.0.0.1 -j DROP
arptables-nft -A OUTPUT -j mangle --mangle-ip-s 10.0.0.9
